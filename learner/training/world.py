"""The ranks of one learner, and what they tell each other.

    rank 0 ── send(command) ──> receive() of every other rank          gloo, on the host; JSON, never pickle
    every rank ── gather, gather_text ──> the same list on every rank
    every rank ── reduce, totals ──> the same numbers on every rank

A learner of one process is a world of size 1, where all of this costs nothing. Collectives of the model's own tensors
(FSDP) and of checkpoints have process groups of their own, so that they may overlap.

Shape legend: n elements of an array, which may differ between ranks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from learner.losses.batch_statistics import Reduction
from leeway.errors import ConfigError, InvalidDataError


def compute_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """Where the learner computes; `auto` is a GPU where there is one.

    Raises:
        ConfigError: a GPU is asked for and none can be used.
    """
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise ConfigError(
            'learner.training.device is "cuda", but PyTorch finds no GPU; check the driver and the installed build of '
            'torch, or set "cpu"'
        )
    return torch.device("cuda") if found and name != "cpu" else torch.device("cpu")


class World:
    """A learner of one process."""

    rank = 0
    size = 1

    def __init__(self, device: torch.device | None = None) -> None:
        """Compute on `device`; on the CPU without one."""
        self.device = device or torch.device("cpu")

    def reduce(self, tensor: Tensor, reduction: Reduction) -> Tensor:
        """Sum or maximum over the ranks; a `learner.losses.batch_statistics.Reduce`."""
        return tensor

    def totals(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Sums over the ranks, of the same names everywhere."""
        sums = self.reduce(torch.tensor(list(numbers.values()), dtype=torch.float64), "sum")
        return dict(zip(numbers, cast("list[float]", sums.tolist()), strict=True))

    def gather(self, array: NDArray[Any]) -> list[NDArray[Any]]:
        """Every rank's array [n], in the order of ranks; of one type everywhere, records included."""
        return [array]

    def gather_text(self, text: str) -> list[str]:
        """Every rank's text, in the order of ranks."""
        return [text]

    def save_group(self, name: str) -> dist.ProcessGroup | None:
        """The process group for saving one kind of tensors; None in a single process."""
        return None


class TorchWorld(World):
    """The processes that torchrun started."""

    def __init__(self, idle_seconds: float, device: torch.device | None = None) -> None:
        """Join the others.

        Args:
            idle_seconds: longest time that rank 0 may leave the others without a command.
            device: of which kind every rank has one; the CPU without.
        """
        cuda = device is not None and device.type == "cuda"
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        super().__init__(torch.device("cuda", self.rank % torch.cuda.device_count()) if cuda else device)
        if cuda:
            torch.cuda.set_device(self.device)
        self._control = _group(idle_seconds)
        self._save_groups = {name: _group(idle_seconds) for name in ("weights", "optimizer", "proximal")}

    def mesh(self) -> DeviceMesh:
        """All ranks as one dimension of data parallelism."""
        return init_device_mesh(self.device.type, (self.size,), mesh_dim_names=("data",))

    def reduce(self, tensor: Tensor, reduction: Reduction) -> Tensor:
        reduced = tensor.detach().clone().cpu()
        operation = dist.ReduceOp.SUM if reduction == "sum" else dist.ReduceOp.MAX
        dist.all_reduce(reduced, op=operation, group=self._control)
        return reduced.to(tensor.device)

    def gather(self, array: NDArray[Any]) -> list[NDArray[Any]]:
        return [np.frombuffer(data, dtype=array.dtype) for data in self._gather_bytes(array.tobytes())]

    def gather_text(self, text: str) -> list[str]:
        return [data.decode() for data in self._gather_bytes(text.encode())]

    def save_group(self, name: str) -> dist.ProcessGroup | None:
        return self._save_groups[name]

    def send(self, command: Mapping[str, Any]) -> None:
        """Rank 0: tell every other rank what to do next."""
        payload = json.dumps(command).encode()
        dist.broadcast(torch.tensor([len(payload)]), src=0, group=self._control)
        dist.broadcast(_bytes_tensor(payload), src=0, group=self._control)

    def receive(self) -> dict[str, Any]:
        """The others: wait for the next command.

        Raises:
            InvalidDataError: it is not one.
        """
        size = torch.zeros(1, dtype=torch.int64)
        dist.broadcast(size, src=0, group=self._control)
        payload = torch.zeros(int(size), dtype=torch.uint8)
        dist.broadcast(payload, src=0, group=self._control)
        command: Any = json.loads(payload.numpy().tobytes())
        if not isinstance(command, dict):
            raise InvalidDataError("rank 0 sent something that is not a command")
        return cast("dict[str, Any]", command)

    def close(self) -> None:
        """Leave together: a peer that is gone first can abort the others' connections."""
        dist.barrier(group=self._control)
        dist.destroy_process_group()

    def _gather_bytes(self, data: bytes) -> list[bytes]:
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(data)]), group=self._control)
        longest = max(int(size) for size in sizes)
        padded = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(padded, _bytes_tensor(data.ljust(longest, b"\0")), group=self._control)
        return [piece[: int(size)].numpy().tobytes() for piece, size in zip(padded, sizes, strict=True)]


def _group(idle_seconds: float) -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=idle_seconds))
    assert isinstance(group, dist.ProcessGroup)
    return group


def _bytes_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)
