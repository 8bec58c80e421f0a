"""What durability costs; see the package. Exit code 1 when a promise is not kept.

python -m benchmarks.replay_buffer                              everything
python -m benchmarks.replay_buffer --only throughput --sizes "7 KB" --contenders "bare stream" Leeway
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from benchmarks.replay_buffer import throughput
from benchmarks.replay_buffer.report import print_table
from benchmarks.replay_buffer.workload import WORKLOADS


def main() -> int:
    """Measure, print, judge."""
    names = [throughput.BARE, throughput.LEEWAY, throughput.UNSYNCED, throughput.REVERB, throughput.REDIS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5, help="of each figure; medians are printed")
    parser.add_argument("--sizes", nargs="+", default=[one.name for one in WORKLOADS], metavar="SIZE")
    parser.add_argument("--contenders", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--folder", type=Path, default=Path("build/benchmark"), help="where servers keep their data")
    parser.add_argument("--peers", type=Path, default=Path("build/peers"), help="environments of the peers")
    arguments = parser.parse_args()
    workloads = [one for one in WORKLOADS if one.name in arguments.sizes]
    results = asyncio.run(
        throughput.measure(
            workloads, arguments.contenders, arguments.repetitions, arguments.folder, arguments.peers.resolve()
        )
    )
    print_table(results, throughput.BARE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
