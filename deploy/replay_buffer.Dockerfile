# syntax=docker/dockerfile:1
# The replay buffer. No torch, no transformers.
# Build from the repository's root:  docker build -f deploy/replay_buffer.Dockerfile -t leeway/replay-buffer .
ARG BASE=python:3.11-slim

FROM ${BASE} AS build
WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY leeway leeway
COPY inference_server inference_server
COPY learner learner
COPY replay_buffer replay_buffer
COPY examples examples
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv /opt/leeway \
    && /opt/leeway/bin/pip install "." --constraint constraints.txt

FROM ${BASE}
RUN useradd --system --uid 10001 --home-dir /var/lib/leeway --create-home leeway
COPY --from=build /opt/leeway /opt/leeway
ENV PATH=/opt/leeway/bin:$PATH
USER 10001
WORKDIR /var/lib/leeway
VOLUME /var/lib/leeway
# gRPC, then /metrics
EXPOSE 7401 9401
STOPSIGNAL SIGTERM
# A service listens on the name that its peers dial, not on the container's loopback.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["sh", "-c", "exec leeway health $(hostname):7401"]
ENTRYPOINT ["leeway", "serve", "replay-buffer"]
CMD ["--help"]
