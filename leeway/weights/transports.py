"""The transports of weights by name. A new one is a line in `TRANSPORTS` and a class on each side. Torch-free."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from leeway.errors import ConfigError
from leeway.rpc import is_loopback

if TYPE_CHECKING:
    from leeway.config import NetworkOptions

_EVERYWHERE: Final = ("0.0.0.0", "[::]", "*")  # noqa: S104 (refused)


def _works(network: NetworkOptions) -> None:
    """Any network will do."""


def _check_broadcasts(network: NetworkOptions) -> None:
    if importlib.util.find_spec("torch") is None:
        raise ConfigError(
            'network.weights: "collective" needs torch in every process that sends or takes weights; install it or '
            'set "grpc"'
        )
    if network.policy.rpartition(":")[0] in _EVERYWHERE:
        raise ConfigError(
            f"network.policy: {network.policy} names no host at which broadcasts could meet; name one, or set "
            'network.weights = "grpc"'
        )
    if not (is_loopback(network.policy) or network.insecure):
        raise ConfigError(
            'network.weights: "collective" would send weights beyond this host unencrypted (digests still guard every '
            'byte); set network.insecure = true if that network is yours alone, or "grpc"'
        )


@dataclass(frozen=True, slots=True)
class TransportEntry:
    """A transport that `network.weights` may name.

    Args:
        transport: "module:class" of a server's side, an `inference_server.weights.transports.WeightTransport`, made as
            class(source).
        outlet: the same of the learner's side, a `learner.weights.outlets.WeightOutlet`, made as class(metrics, host,
            patience_seconds); None for gRPC, which the learner always offers.
        check: raises ConfigError for a network on which it cannot work.
    """

    transport: str
    outlet: str | None = None
    check: Callable[[NetworkOptions], None] = _works


TRANSPORTS: Final[dict[str, TransportEntry]] = {
    "zmq": TransportEntry("inference_server.weights.transports:ZmqTransport", "learner.weights.outlets:ZmqOutlet"),
    "grpc": TransportEntry("inference_server.weights.transports:GrpcTransport"),
    "collective": TransportEntry(
        "inference_server.weights.collective:BroadcastTransport",
        "learner.weights.collective:BroadcastOutlet",
        _check_broadcasts,
    ),
}


def weight_transports(network: NetworkOptions) -> tuple[str, ...]:
    """Names of the transports of a run, the preferred one first; the last one, gRPC, always works.

    Raises:
        ConfigError: the transport that network.weights names cannot work on this network.
    """
    name = network.weights
    if name == "auto":
        name = "zmq" if is_loopback(network.policy) else "grpc"
    TRANSPORTS[name].check(network)
    return tuple(dict.fromkeys((name, "grpc")))


def load_side(reference: str) -> Callable[..., Any]:
    """The class that a TransportEntry names, whose module may import torch."""
    module, _, name = reference.partition(":")
    loaded: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return loaded
