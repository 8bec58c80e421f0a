"""Addresses, certificates and ports, and the ways that weights take."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from leeway.config.document import Address, ConfigPath, Options, Registered
from leeway.rpc import Security, is_loopback
from leeway.weights.transports import TRANSPORTS


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
    weights: Annotated[str, AfterValidator(Registered("transport", ("auto", *TRANSPORTS)))] = Field(
        default="auto",
        description="How weights travel. auto: over ZeroMQ where network.policy is a loopback address, else over gRPC; "
        "zmq: over ZeroMQ on the learner's host; grpc: over gRPC; collective: broadcast to all servers at once over "
        "torch.distributed (gloo), unencrypted. gRPC takes over wherever another way fails.",
    )

    @model_validator(mode="after")
    def _mutual_tls_is_whole(self) -> NetworkOptions:
        files = {"certificate": self.certificate, "key": self.key, "authority": self.authority}
        missing = [name for name, path in files.items() if path is None]
        if 0 < len(missing) < len(files):
            raise ValueError(f"mutual TLS needs certificate, key and authority; set `{missing[0]}`, too")
        return self

    def security(self) -> Security:
        """The certificates, read.

        Raises:
            ConfigError: a file cannot be read.
        """
        return Security.from_files(self.certificate, self.key, self.authority, insecure=self.insecure)

    @property
    def trusted(self) -> bool:
        """Whether services may listen beyond loopback."""
        return self.insecure or self.certificate is not None

    @property
    def weight_transports(self) -> tuple[str, ...]:
        """Names of the transports of weights, the preferred one first; the last one, gRPC, always works."""
        name = self.weights
        if name == "auto":
            name = "zmq" if is_loopback(self.policy) else "grpc"
        return tuple(dict.fromkeys((name, "grpc")))

    @property
    def uses_broadcasts(self) -> bool:
        """Whether the learner broadcasts weights to all servers at once."""
        return any(TRANSPORTS[name].broadcast for name in self.weight_transports)


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
