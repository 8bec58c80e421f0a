"""Addresses, certificates and ports."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from leeway.config.document import Address, ConfigPath, Options
from leeway.weights.transports import TRANSPORTS


def _registered(name: str) -> str:
    if name not in ("auto", *TRANSPORTS):
        raise ValueError(f"there is no transport {name!r}; choose one of auto, {', '.join(TRANSPORTS)}")
    return name


class NetworkOptions(Options):
    """[network]: where services listen, and how they trust each other. Port 0 lets `leeway run` pick a free one."""

    replay_buffer: Address = Field(default="127.0.0.1:7401", description="Address of the replay buffer.")
    policy: Address = Field(default="127.0.0.1:7402", description="Address at which the learner publishes weights.")
    inference_servers: tuple[Address, ...] = Field(
        default=("127.0.0.1:7403", "127.0.0.1:7404"),
        strict=False,
        description="Addresses of the inference servers; `leeway run` starts one server for each.",
    )
    insecure: bool = Field(
        default=False, description="Allow listening beyond loopback without certificates, on a network you trust."
    )
    certificate: ConfigPath | None = Field(
        default=None, description="PEM file of this service's certificate, for mutual TLS."
    )
    key: ConfigPath | None = Field(default=None, description="PEM file of the certificate's private key.")
    authority: ConfigPath | None = Field(
        default=None, description="PEM file of the authority that signed the certificates of all services."
    )
    weights: Annotated[str, AfterValidator(_registered)] = Field(
        default="auto",
        description="How weights travel: ZeroMQ on one host, gRPC beyond; auto picks by address. collective broadcasts "
        "them to all servers at once over torch.distributed (gloo), unencrypted, with gRPC where that fails.",
    )


class MetricsOptions(Options):
    """[metrics]: ports of the Prometheus metrics. Port 0 lets `leeway run` pick a free one."""

    host: str = Field(default="127.0.0.1", description="Interface on which the ports are opened.")
    replay_buffer: int = Field(default=9401, ge=0, le=65535, description="Port of the replay buffer's metrics.")
    learner: int = Field(default=9402, ge=0, le=65535, description="Port of the learner's metrics.")
    inference_servers: tuple[Annotated[int, Field(ge=0, le=65535)], ...] = Field(
        default=(9403, 9404),
        strict=False,
        description="Ports of the inference servers' metrics, in the order of network.inference_servers.",
    )
