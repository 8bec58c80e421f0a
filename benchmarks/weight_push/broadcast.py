"""A gloo broadcast of the same bytes between two processes: what a full push is compared with.

`python -m benchmarks.weight_push.broadcast --rank 1 --port 5000 --rounds R --sizes N N ...`

*by tensor*, as engines take weights: one broadcast each, into a new tensor, since what is served must stay whole until
all have come. *at once*: one broadcast into the same memory every time, which nobody could serve from.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist


class Broadcast:
    """One of two ranks; rank 0 sends."""

    def __init__(self, rank: int, port: int, sizes: Sequence[int]) -> None:
        dist.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=timedelta(seconds=120)
        )
        self._rank = rank
        self._sizes = sizes
        self._whole = torch.zeros(sum(sizes), dtype=torch.uint8)
        self._tensors = [torch.zeros(size, dtype=torch.uint8) for size in sizes]

    def rounds(self) -> tuple[float, float]:
        """Seconds until both have everything: by tensor, at once."""
        return self._timed(self._by_tensor), self._timed(lambda: dist.broadcast(self._whole, 0))

    def _by_tensor(self) -> None:
        if self._rank:
            self._tensors = [torch.empty(size, dtype=torch.uint8) for size in self._sizes]
        for tensor in self._tensors:
            dist.broadcast(tensor, 0)

    @staticmethod
    def _timed(call: Callable[[], object]) -> float:
        dist.barrier()
        began = time.perf_counter()
        call()
        dist.barrier()
        return time.perf_counter() - began

    def close(self) -> None:
        """Leave the group."""
        dist.destroy_process_group()


def main() -> None:
    """Take part as one rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--rank", "--port", "--rounds"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    broadcast = Broadcast(arguments.rank, arguments.port, arguments.sizes)
    for _ in range(arguments.rounds):
        broadcast.rounds()
    broadcast.close()


if __name__ == "__main__":
    main()
