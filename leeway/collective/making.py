"""The library that the configuration names."""

from __future__ import annotations

from leeway.collective.library import Library
from leeway.weight_transports import BroadcastLibrary


def make_library(name: BroadcastLibrary) -> Library:
    """What broadcasts; not prepared yet."""
    if name == "nccl":
        from leeway.collective.nccl import nccl

        return nccl()
    from leeway.collective.gloo import Gloo  # imports torch

    return Gloo()
