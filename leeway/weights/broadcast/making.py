"""The library that the configuration names."""

from __future__ import annotations

from leeway.weights.broadcast.library import Library
from leeway.weights.transports import BroadcastLibrary


def make_library(name: BroadcastLibrary) -> Library:
    """What broadcasts; not prepared yet."""
    if name == "nccl":
        from leeway.weights.broadcast.nccl import nccl

        return nccl()
    from leeway.weights.broadcast.gloo import Gloo  # imports torch

    return Gloo()
