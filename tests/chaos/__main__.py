"""`python -m tests.chaos --kills 200`: see tests/chaos/driver.py. Exit code 1 when anything is violated."""

from __future__ import annotations

import argparse
import contextlib
import secrets
import sys
import tempfile
from pathlib import Path

from tests.chaos.driver import drive
from tests.chaos.plan import RETENTIONS, Plan
from tests.chaos.planted import BUGS


def main() -> int:
    """Parse and drive."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=None, help="seed of an earlier suite, to repeat it")
    parser.add_argument("--plant", choices=sorted(BUGS), help="plant a bug, which must be found")
    parser.add_argument("--directory", type=Path, default=None, help="keep its files in this folder")
    arguments = parser.parse_args()
    seed = secrets.randbelow(1 << 31) if arguments.seed is None else arguments.seed
    with contextlib.ExitStack() as stack:
        directory = arguments.directory or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        bug = BUGS.get(arguments.plant)
        plan = (
            Plan(seed, arguments.kills, directory, rollbacks=0.08, clock_and_disk=0.5, retentions=RETENTIONS)
            if bug is None
            else bug.planted(arguments.plant, seed, directory)
        )
        print(f"chaos: {plan.kills} kills, seed {seed}", flush=True)
        tally = drive(plan, lambda line: print(line, flush=True))
    print("\n".join(tally.lines()), flush=True)
    return 1 if tally.violations else 0


if __name__ == "__main__":
    sys.exit(main())
