# syntax=docker/dockerfile:1
# An inference server with the transformers engine.
# Build from the repository's root:  docker build -f deploy/inference_server.Dockerfile -t leeway/inference-server .
ARG BASE=python:3.11-slim

FROM ${BASE} AS build
# Passed on to pip: the index of a CPU build of torch, for machines without a GPU.
ARG PIP_EXTRA_INDEX_URL=
WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY leeway leeway
COPY inference_server inference_server
COPY learner learner
COPY replay_buffer replay_buffer
COPY examples examples
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv /opt/leeway \
    && /opt/leeway/bin/pip install ".[transformers]" --constraint constraints.txt

FROM ${BASE}
RUN useradd --system --uid 10001 --home-dir /var/lib/leeway --create-home leeway
COPY --from=build /opt/leeway /opt/leeway
ENV PATH=/opt/leeway/bin:$PATH
USER 10001
WORKDIR /var/lib/leeway
VOLUME /var/lib/leeway
# gRPC, then /metrics
EXPOSE 7403 9403
STOPSIGNAL SIGTERM
# A service listens on the name that its peers dial, not on the container's loopback.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["sh", "-c", "exec leeway health $(hostname):7403"]
ENTRYPOINT ["leeway", "serve", "inference-server"]
CMD ["--help"]
