"""What durability costs; see the package. Exit code 1 when a promise is not kept.

    python -m benchmarks.replay_buffer                      everything
    python -m benchmarks.replay_buffer --only throughput --sizes "7 KB" --contenders "bare stream" Leeway
    python -m benchmarks.replay_buffer --only growth --log-gigabytes 0.1 1 10

Environments of the peers are made at the first run.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from benchmarks.replay_buffer import growth, recovery, throughput, tokens
from benchmarks.replay_buffer.report import print_table, verdict
from benchmarks.replay_buffer.verdicts import judge
from benchmarks.replay_buffer.workload import WORKLOADS

SECTIONS = ("throughput", "tokens", "recovery", "growth")


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="SECTION")
    parser.add_argument("--repetitions", type=int, default=3, help="of each figure; medians are printed")
    parser.add_argument("--sizes", nargs="+", default=[one.name for one in WORKLOADS], metavar="SIZE")
    parser.add_argument("--contenders", nargs="+", choices=throughput.NAMES, default=throughput.NAMES, metavar="NAME")
    parser.add_argument("--log-gigabytes", nargs="+", type=float, default=[0.1, 0.5, 1.0], metavar="GB")
    parser.add_argument("--folder", type=Path, default=Path("build/benchmark"), help="where servers keep their data")
    parser.add_argument("--peers", type=Path, default=Path("build/peers"), help="environments of the peers")
    return asyncio.run(measure(parser.parse_args()))


async def measure(arguments: argparse.Namespace) -> int:
    """The chosen sections, one after the other; returns the exit code."""
    kept: list[bool] = []
    folder, peers = arguments.folder, arguments.peers.resolve()
    if "throughput" in arguments.only:
        workloads = [one for one in WORKLOADS if one.name in arguments.sizes]
        results = await throughput.measure(workloads, arguments.contenders, arguments.repetitions, folder, peers)
        print_table(results, throughput.BARE)
        kept += judge(results)
    if "tokens" in arguments.only:
        samples = await tokens.measure(arguments.repetitions, folder)
        tokens.print_tokens(samples)
        kept.append(verdict("tokens a second", tokens.tokens_per_second(samples), 100_000, unit=""))
    if "recovery" in arguments.only:
        found, missing = await recovery.measure(folder, peers)
        recovery.print_recovery(found, missing)
        kept.append(verdict("acknowledged trajectories that Leeway kept", float(found[0].lost == 0), 1, unit=""))
    if "growth" in arguments.only:
        await growth.writers(folder, 2)
        await growth.log(folder, sorted(arguments.log_gigabytes))
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
