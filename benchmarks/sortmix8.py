"""Runs examples/sortmix8.toml over seeds and staleness bounds, and prints what it came to.

    python -m benchmarks.sortmix8 --seeds 0 1 2 --staleness 2 0 --output build/sortmix8

The same configuration throughout: only `run.seed` and `run.max_staleness` change, and runs follow each other on the
same machine. A ratio compares the medians of two bounds; the quickstart's promise is checked for bound 2.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CONFIG = Path(__file__).parents[1] / "examples" / "sortmix8.toml"
COLUMNS = (
    ("heldout_before", "before", "{:.3f}"),
    ("heldout_after", "after", "{:.3f}"),
    ("wall_seconds", "wall s", "{:.0f}"),
    ("tokens_per_second", "tokens/s", "{:.0f}"),
    ("stale_token_fraction", "stale", "{:.0%}"),
    ("learner_idle_fraction", "idle", "{:.0%}"),
    ("overlap_seconds", "overlap s", "{:.0f}"),
)


def main() -> int:
    """Run, print a table and the comparison; exit 1 if the promise is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--staleness", type=int, nargs="+", default=[2, 0])
    parser.add_argument("--output", type=Path, default=Path("build/sortmix8"), help="folder for the runs")
    arguments = parser.parse_args()
    print("bound  seed  " + "  ".join(f"{title:>9}" for _, title, _ in COLUMNS), flush=True)
    results: dict[int, list[dict[str, Any]]] = {bound: [] for bound in arguments.staleness}
    for seed in arguments.seeds:  # bounds in turn, so that a drift of the machine meets all of them
        for bound in arguments.staleness:
            summary = run(arguments.output, seed, bound)
            results[bound].append(summary)
            cells = (layout.format(summary[key]).rjust(9) for key, _, layout in COLUMNS)
            print(f"{bound:>5}  {seed:>4}  " + "  ".join(cells), flush=True)
    compare(results)
    return 0 if 2 not in results or promise_kept(results[2]) else 1


def run(output: Path, seed: int, bound: int) -> dict[str, Any]:
    """One whole run; its summary."""
    name = f"staleness-{bound}-seed-{seed}"
    overrides = {"run.name": name, "run.directory": str(output.resolve()), "run.seed": seed, "run.max_staleness": bound}
    command = [sys.executable, "-m", "leeway.cli.main", "run", str(CONFIG), "--plain"]
    for key, value in overrides.items():
        command += ["--set", f"{key}={json.dumps(value)}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return json.loads((output / name / "summary.json").read_text(encoding="utf-8"))


def compare(results: dict[int, list[dict[str, Any]]]) -> None:
    """Median of each bound against the last one given."""
    reference = list(results)[-1]
    base = median(results[reference], "wall_seconds")
    for bound, summaries in results.items():
        wall = median(summaries, "wall_seconds")
        print(
            f"bound {bound}: median wall {wall:.0f} s, {base / wall:.2f}x the speed of bound {reference}; "
            f"held-out median {median(summaries, 'heldout_after'):.3f}"
        )


def promise_kept(summaries: Sequence[dict[str, Any]]) -> bool:
    """0.85 as the mean, 0.80 each, 2000 draws, within 4 minutes, half of the tokens stale; prints the verdict."""
    after = [summary["heldout_after"] for summary in summaries]
    kept = (
        statistics.fmean(after) >= 0.85
        and min(after) >= 0.80
        and all(summary["heldout_draws"] >= 2000 for summary in summaries)
        and all(summary["wall_seconds"] <= 240 for summary in summaries)
        and all(summary["stale_token_fraction"] >= 0.5 for summary in summaries)
    )
    verdict = "kept" if kept else "NOT kept"
    print(f"bound 2: held-out mean {statistics.fmean(after):.3f}, least {min(after):.3f}; promise {verdict}")
    return kept


def median(summaries: Sequence[dict[str, Any]], key: str) -> float:
    """Median of one figure."""
    return statistics.median(summary[key] for summary in summaries)


if __name__ == "__main__":
    sys.exit(main())
