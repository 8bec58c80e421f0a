"""The transports of weights by name. A new one is a line in `TRANSPORTS` and a class on each side. Torch-free."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True, slots=True)
class TransportEntry:
    """A transport that `network.weights` may name.

    Args:
        transport: "module:class" of a server's side, an `inference_server.weights.transports.WeightTransport`, made as
            class(source).
        outlet: the same of the learner's side, a `learner.weights.outlets.WeightOutlet`, made as class(metrics, host,
            patience_seconds); None for gRPC, which the learner always offers.
        broadcast: whether it sends to all servers at once over torch.distributed, unencrypted.
    """

    transport: str
    outlet: str | None = None
    broadcast: bool = False


TRANSPORTS: Final[dict[str, TransportEntry]] = {
    "zmq": TransportEntry("inference_server.weights.transports:ZmqTransport", "learner.weights.outlets:ZmqOutlet"),
    "grpc": TransportEntry("inference_server.weights.transports:GrpcTransport"),
    "collective": TransportEntry(
        "inference_server.weights.collective:BroadcastTransport",
        "learner.weights.collective:BroadcastOutlet",
        broadcast=True,
    ),
}


def load_side(reference: str) -> Callable[..., Any]:
    """The class that a TransportEntry names, whose module may import torch."""
    module, _, name = reference.partition(":")
    loaded: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return loaded
