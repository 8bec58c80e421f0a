"""Broadcasts over NCCL between GPUs of this machine: python -m tests.collective.nccl_check

What the suite checks on the CPU, with NCCL and a GPU for every member: bytes, a member that is killed or stopped in mid
broadcast, two members on one GPU. Prints versions, verdicts, and gigabytes a second beside gloo. Exits 0 when
everything holds, 1 when something does not, and 2 with fewer than two GPUs, unless --on-cpu tries the script itself.
"""

from __future__ import annotations

import argparse
import os
import platform
import secrets
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch

from leeway.errors import LeewayError, UnavailableError
from leeway.weights.broadcast.carried import Carried
from leeway.weights.broadcast.gloo import Gloo
from leeway.weights.broadcast.library import Group, Library
from leeway.weights.broadcast.nccl import nccl
from tests.collective.cpu_carrier import cpu_library
from tests.collective.members import broadcast, formed, prepared

ROUNDS = 5
LATE_SECONDS = 15.0
"""Beyond the patience: a carrier's grace, its end, and a busy machine."""


class Report:
    """Verdicts, printed as they come."""

    def __init__(self) -> None:
        self.failures = 0

    def expect(self, what: str, holds: bool, found: str = "") -> None:
        self.failures += not holds
        print(f"{'ok  ' if holds else 'FAIL'} {what}{': ' if found else ''}{found}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=2048, help="of one push")
    parser.add_argument("--patience", type=float, default=10.0, metavar="SECONDS", help="as broadcast_patience_seconds")
    parser.add_argument("--on-cpu", action="store_true", help="try the script itself where there are no two GPUs")
    arguments = parser.parse_args(argv)
    print(f"python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    if arguments.on_cpu:
        make: list[Callable[[], Carried]] = [lambda: cpu_library(1 << 16) for _ in range(3)]
        same = [cpu_library(1 << 16, "--identity", "one CPU") for _ in range(2)]
    else:
        gpus = visible_gpus()
        for gpu in range(len(gpus)):
            print(f"GPU {gpus[gpu]}: {torch.cuda.get_device_name(gpu)}")
        if len(gpus) < 2:
            print(f"torch finds {len(gpus)} GPUs, and NCCL needs one for each member: run this where there are two")
            return 2
        make = [lambda gpu=gpu: nccl({"CUDA_VISIBLE_DEVICES": gpu}) for gpu in gpus]
        same = [nccl({"CUDA_VISIBLE_DEVICES": gpus[0]}) for _ in range(2)]
    report = Report()
    libraries = [one() for one in make]
    try:
        prepared(libraries)
        print(f"{libraries[0].name}, {len(libraries)} members, {arguments.megabytes} MB, {arguments.patience:g} s")
        parts = [secrets.token_bytes(1 << 20) for _ in range(arguments.megabytes)]
        check_bytes(report, "this library", libraries, parts, arguments.patience)
        check_bytes(report, "gloo", [Gloo() for _ in libraries], parts, arguments.patience)
        for how in (signal.SIGKILL, signal.SIGSTOP):
            for victim in (len(libraries) - 1,) if arguments.on_cpu else (len(libraries) - 1, 0):
                check_failure(report, libraries, parts, arguments.patience, how, victim)
        prepared(same)
        refusals = [one.message for one in formed(same, arguments.patience) if isinstance(one, UnavailableError)]
        report.expect("two members on one device are refused", len(refusals) == 2, refusals[0] if refusals else "")
    except LeewayError as error:
        report.expect("the check comes to its end", False, error.message)
    finally:
        for library in (*libraries, *same):
            library.close()
    print(f"{report.failures} failures")
    return 1 if report.failures else 0


def visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    given = os.environ["CUDA_VISIBLE_DEVICES"].split(",") if "CUDA_VISIBLE_DEVICES" in os.environ else []
    return given[:count] or [str(index) for index in range(count)]


def all_formed(libraries: Sequence[Library], patience_seconds: float) -> list[Group]:
    groups = formed(libraries, patience_seconds)
    for group in groups:
        if isinstance(group, UnavailableError):
            raise group
    return [group for group in groups if not isinstance(group, UnavailableError)]


def check_bytes(
    report: Report, name: str, libraries: Sequence[Library], parts: Sequence[bytes], patience_seconds: float
) -> None:
    """Every byte at every member, several times in one group."""
    began = time.perf_counter()
    groups = all_formed(libraries, patience_seconds)
    print(f"     {name} forms a group in {time.perf_counter() - began:.2f} s")
    whole = bytearray().join(parts)
    equal, seconds = True, list[float]()
    for _ in range(ROUNDS):
        began = time.perf_counter()
        received = broadcast(groups, parts)
        seconds.append(time.perf_counter() - began)
        equal = equal and all(one == whole for one in received)
    speed = len(whole) / statistics.median(seconds) / 1e9
    report.expect(f"{name}: every byte at every member, {ROUNDS} times", equal, f"{speed:.2f} GB/s each (median)")


def check_failure(
    report: Report,
    libraries: Sequence[Carried],
    parts: Sequence[bytes],
    patience_seconds: float,
    how: signal.Signals,
    victim: int,
) -> None:
    """A member that is gone or silent in mid broadcast ends the group for all, and this process goes on."""
    groups = all_formed(libraries, patience_seconds)
    carrier = libraries[victim]._carrier
    assert carrier is not None
    struck = 0.0

    def strike(index: int) -> None:
        nonlocal struck
        if index == 5:
            carrier._process.send_signal(how)
            struck = time.perf_counter()

    outcomes = broadcast(groups, parts, strike)
    seconds = time.perf_counter() - struck
    who = "the sender" if victim == 0 else f"member {victim}"
    told = all(isinstance(one, UnavailableError) for one in outcomes) and struck > 0
    report.expect(f"{how.name} of {who}: all end with an error", told)
    in_time = seconds < patience_seconds + LATE_SECONDS
    report.expect(f"{how.name} of {who}: in time", in_time, f"{seconds:.1f} s")
    prepared(libraries)
    whole = bytearray().join(parts)
    received = broadcast(all_formed(libraries, patience_seconds), parts)
    report.expect(f"{how.name} of {who}: another group afterwards", all(one == whole for one in received))


if __name__ == "__main__":
    sys.exit(main())
