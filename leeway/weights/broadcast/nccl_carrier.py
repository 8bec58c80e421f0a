"""The carrier of NCCL, started by `leeway.weights.broadcast.nccl`."""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from leeway.errors import ConfigError
from leeway.weights.broadcast.carrying import ProcessGroup, carry
from leeway.weights.broadcast.rendezvous import Store

_INSTEAD = 'set network.weights = "collective" (gloo, which needs no GPU) or "grpc"'

log = logging.getLogger(__name__)

# Exported by builds for CUDA only.
_dist: Any = dist
_cuda: Any = torch.cuda


class Gpu:
    """Implements `leeway.weights.broadcast.carrying.Device`: the first GPU that this process sees.

    Raises:
        ConfigError: there is none, or no NCCL.
    """

    def __init__(self) -> None:
        if not dist.is_available() or not dist.is_nccl_available():
            raise ConfigError(
                f'network.weights: "collective-nccl", but torch {torch.__version__} is a build without NCCL; install '
                f"one for CUDA, or {_INSTEAD}"
            )
        if not torch.cuda.is_available():
            raise ConfigError(
                f'network.weights: "collective-nccl", but torch {torch.__version__} finds no GPU; check the driver and '
                f"CUDA_VISIBLE_DEVICES, or {_INSTEAD}"
            )
        self.device = torch.device("cuda", 0)
        torch.cuda.set_device(self.device)
        version = ".".join(map(str, _cuda.nccl.version()))
        self.name = f"nccl/{version} torch/{torch.__version__.partition('+')[0]}"
        self.identity = str(_cuda.get_device_properties(self.device).uuid)

    def pin(self, memory: torch.Tensor) -> None:
        error = int(_cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
        if error:
            log.warning("memory for broadcasts is not pinned (CUDA error %d): copies to the GPU are slower", error)

    def form(
        self, store: Store, address: tuple[str, int], rank: int, size: int, patience_seconds: float
    ) -> ProcessGroup:
        options = _dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=patience_seconds)
        return _dist.ProcessGroupNCCL(store, rank, size, options)

    def leave(self, group: ProcessGroup) -> None:
        group.abort()


if __name__ == "__main__":
    carry(Gpu)
