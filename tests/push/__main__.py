"""`python -m tests.push --pushes 1000`: see tests/push/driver.py. Exit code 1 when anything is violated."""

from __future__ import annotations

import argparse
import asyncio
import secrets
import sys

from tests.push.driver import push_under_faults


def main() -> int:
    """Parse, push, report."""
    parser = argparse.ArgumentParser(prog="python -m tests.push", description=__doc__)
    parser.add_argument("--pushes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=None, help="of an earlier run, to repeat its faults")
    arguments = parser.parse_args()
    seed = secrets.randbelow(1 << 31) if arguments.seed is None else arguments.seed
    print(f"{arguments.pushes} pushes, seed {seed}", flush=True)
    outcome = asyncio.run(push_under_faults(arguments.pushes, seed, tell=lambda line: print(line, flush=True)))
    for what, count in sorted(outcome.kinds.items()):
        print(f"{count:>8}  {what}")
    print(f"{outcome.pushes} pushes, {outcome.looks} looks, {len(outcome.violations)} violations")
    print("\n".join(outcome.violations[:20]))
    return 1 if outcome.violations else 0


if __name__ == "__main__":
    sys.exit(main())
