"""A carrier whose device is the CPU and whose process groups are gloo's: what NCCL's does, where there is no GPU."""

from __future__ import annotations

import argparse
import os
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from leeway.errors import ConfigError
from leeway.weights.broadcast.carried import Carried
from leeway.weights.broadcast.carrying import carry
from leeway.weights.broadcast.gloo import form_gloo
from leeway.weights.broadcast.rendezvous import local_host

ROOT = Path(__file__).parents[2]


class Cpu:
    """Implements `leeway.weights.broadcast.carrying.Device`."""

    device = torch.device("cpu")

    def __init__(self, options: argparse.Namespace) -> None:
        torch.set_num_threads(1)
        if options.refuses:
            raise ConfigError(options.refuses)
        self.name = "cpu/" + " ".join(sorted(name for name in os.environ if name.startswith("TORCH_NCCL_")))
        self.identity = options.identity or f"process {os.getpid()}"
        self._hangs = options.hangs

    def pin(self, memory: torch.Tensor) -> None:
        pass

    def form(self, store: Any, address: tuple[str, int], rank: int, size: int, patience_seconds: float) -> Any:
        if self._hangs:
            threading.Event().wait()
        return form_gloo(store, rank, size, local_host(address), patience_seconds)

    def leave(self, group: Any) -> None:
        pass


def cpu_library(piece_bytes: int, *options: str, environment: dict[str, str] | None = None) -> Carried:
    """What `leeway.weights.broadcast.nccl.nccl` is for GPUs."""
    program = [sys.executable, "-W", "ignore", "-m", "tests.collective.cpu_carrier", *options]
    return Carried(program, piece_bytes, {"PYTHONPATH": str(ROOT), **(environment or {})})


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--identity", default="", help="of the device")
    parser.add_argument("--refuses", default="", help="why this machine cannot take part")
    parser.add_argument("--hangs", action="store_true", help="forms no group and does not say so")
    options, rest = parser.parse_known_args()
    carry(lambda: Cpu(options), rest)


if __name__ == "__main__":
    main()
