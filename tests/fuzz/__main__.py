"""`python -m tests.fuzz --inputs 1000000`: arbitrary and mutated inputs for every RPC and for the log reader.

In one process, at the handlers, without a network. An input may be refused with a LeewayError and nothing else; it may
take ten seconds of CPU at most, and the process may not grow beyond a bound. The first input that breaks this ends it,
with the seed of its batch, which repeats it: `--seed SEED --inputs 10000`.
"""

from __future__ import annotations

import argparse
import logging
import resource
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import FrameType
from typing import Final

from leeway.errors import LeewayError
from tests.fuzz.targets import (
    DirectoryTarget,
    InferenceTarget,
    PolicyTarget,
    RecordTarget,
    ReplayTarget,
    SegmentTarget,
    Target,
)
from tests.model.law import read_frames

_BATCH: Final = 10_000
"""Inputs that meet the same buffer; the next batch begins with an empty one."""
_INPUT_SECONDS: Final = 10
_GROWTH_BYTES: Final = 1 << 30
SHARES: Final = {
    "replay": 0.55,
    "records": 0.25,
    "segments": 0.14,
    "policy": 0.03,
    "inference": 0.03,
    "directories": 0.002,
}


class Hung(BaseException):
    """An input took too long."""


def fuzz(inputs: int, seed: int, say: Callable[[str], None]) -> Counter[str]:
    """Outcomes by target and kind. Raises what an input raised."""
    outcomes: Counter[str] = Counter()
    for begin in range(0, inputs, _BATCH):
        batch_seed = seed + begin // _BATCH
        _batch(min(_BATCH, inputs - begin), batch_seed, outcomes)
        size_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        say(f"{outcomes.total()} inputs, {time.process_time():.0f} s of CPU, {size_mib} MiB at most, seed {batch_seed}")
    return outcomes


def _batch(inputs: int, seed: int, outcomes: Counter[str]) -> None:
    rng = Random(seed)
    source = _honest_directory(rng)
    payloads = list(read_frames(source))
    targets: dict[str, Target] = {
        "replay": ReplayTarget(rng),
        "records": RecordTarget(rng, payloads),
        "segments": SegmentTarget(rng, payloads),
        "policy": PolicyTarget(rng),
        "inference": InferenceTarget(rng),
        "directories": DirectoryTarget(rng, source),
    }
    names, shares = list(SHARES), list(SHARES.values())
    try:
        for number in range(inputs):
            name = rng.choices(names, shares)[0]
            signal.setitimer(signal.ITIMER_PROF, _INPUT_SECONDS)
            try:
                outcomes[f"{name}: {targets[name].try_one()}"] += 1
            except BaseException as error:
                error.add_note(f"input {number} of the batch with seed {seed}, target {name}")
                raise
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
    finally:
        for target in targets.values():
            target.close()
        shutil.rmtree(source)


def _honest_directory(rng: Random) -> Path:
    """A log directory as honest work leaves it."""
    target = ReplayTarget(rng)
    for _ in range(3):
        target._work()
    directory = Path(tempfile.mkdtemp(prefix="fuzz-"))
    target.harness.close()
    shutil.copytree(target.harness.directory, directory, dirs_exist_ok=True)
    target.harness.loop.close()
    shutil.rmtree(target.harness.directory)
    return directory


def _on_alarm(_number: int, _frame: FrameType | None) -> None:
    raise Hung(f"an input took more than {_INPUT_SECONDS} s of CPU")


def main() -> int:
    """Parse and fuzz."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=None)
    arguments = parser.parse_args()
    seed = secrets.randbelow(1 << 31) if arguments.seed is None else arguments.seed
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGPROF, _on_alarm)
    size_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size_bytes + _GROWTH_BYTES, resource.RLIM_INFINITY))
    print(f"fuzz: {arguments.inputs} inputs, seed {seed}", flush=True)
    outcomes = fuzz(arguments.inputs, seed, lambda line: print(line, flush=True))
    for outcome, count in sorted(outcomes.items()):
        print(f"  {outcome}: {count}")
    print(f"fuzz: {outcomes.total()} inputs, none let through anything but a {LeewayError.__name__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
