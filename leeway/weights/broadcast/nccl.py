"""NCCL: through the first GPU that this process sees, by a carrier of its own (`nccl_carrier`). Torch-free."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Final

from leeway.weights.broadcast.carried import Carried

PIECE_BYTES: Final = 64 << 20
"""A wait is a look at the device every millisecond or so, and a copy to it has a price of its own: fewer, larger pieces
than with gloo."""

ENVIRONMENT: Final = {
    "TORCH_NCCL_BLOCKING_WAIT": "1",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
}
"""torch's own variables, read as a ProcessGroupNCCL is made: wait in the calling thread, with a deadline, and start no
watchdog, which would end the process. Only the carrier has them: a learner's own NCCL groups keep their watchdog."""


def nccl(environment: Mapping[str, str] | None = None) -> Carried:
    """The library; `environment` is what its carrier gets beside this process's own."""
    program = [sys.executable, "-m", "leeway.weights.broadcast.nccl_carrier"]
    return Carried(program, PIECE_BYTES, {**(environment or {}), **ENVIRONMENT})
