"""Calls of torch.distributed, whose errors become ours."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from leeway.errors import UnavailableError

_Work = Any


def begin(group: Any, tensor: torch.Tensor, patience: timedelta) -> _Work:  # noqa: ANN401 (torch's)
    """Begin a broadcast from rank 0.

    Raises:
        UnavailableError: the group is of no more use.
    """
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor, options.timeout = 0, 0, patience
    try:
        return group.broadcast([tensor], options)
    except RuntimeError as error:
        raise UnavailableError(f"the broadcast broke: {one_line(error)}") from error


def finish(work: _Work) -> None:
    """Wait for the end of a broadcast.

    Raises:
        UnavailableError: a member is gone or silent.
    """
    try:
        work.wait()
    except RuntimeError as error:
        raise UnavailableError(f"the broadcast broke: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """What torch says, without the place in its sources and the stack."""
    return str(error).partition("] ")[2].partition(". ")[0].partition("\n")[0] or str(error).partition("\n")[0]
