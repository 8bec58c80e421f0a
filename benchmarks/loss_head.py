"""From hidden states to loss and gradients: the learner's fused pass beside TRL, Liger and the naive log-softmax.

    python -m benchmarks.loss_head --output build/loss_head

What is computed, and how memory is measured, is written in `benchmarks.loss_head_contender`. Each contender runs in its
own process, one after the other, round by round; the table shows medians and, in brackets, the least and the most.
TRL and Liger run in an environment of their own, made in the output folder from loss_head_requirements.txt.

Time is the process's CPU time (one thread), so that what other programs take of the machine is not charged to whoever
happened to run; elapsed time is shown beside it. The saving is (all - with zeros) / (0.3 (all - scores only)), timed in
turn within one process: 1 means that tokens without a gradient cost a forward pass and nothing more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.promise import Promise

ROOT = Path(__file__).parents[1]
REQUIREMENTS = Path(__file__).with_name("loss_head_requirements.txt")
PEERS = ("trl-functions", "trl-fused", "liger")
OURS = ("products", "naive", "leeway", "leeway-30%-zero", "leeway-scores")
ORDER = ("products", "naive", *PEERS, "leeway", "leeway-30%-zero", "leeway-scores")
ZERO_FRACTION = 0.3
MEBIBYTE = 2**20


@dataclass(frozen=True)
class Run:
    """One process."""

    wall: float
    cpu: float
    extra_bytes: int
    loss: float


def main() -> int:
    """Run, print the table and the promises; exit 1 if one is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/loss_head"), help="folder for inputs and gradients")
    parser.add_argument("--peers", type=Path, help="python with the peers; default: made in the output folder")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=512)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    peers = arguments.peers or environment(arguments.output.resolve() / "peers")
    sizes = [f"--{name}={getattr(arguments, name)}" for name in ("tokens", "vocabulary", "hidden")]
    contender(Path(sys.executable), "prepare", arguments.output, sizes)
    runs: dict[str, list[Run]] = {name: [] for name in ORDER}
    for number in range(arguments.repeat):
        for name in ORDER:
            output = contender(peers if name in PEERS else Path(sys.executable), name, arguments.output, sizes)
            runs[name].append(Run(**json.loads(output.splitlines()[-1])))
            print(f"round {number + 1} {name}: {runs[name][-1].cpu:.2f} s", file=sys.stderr, flush=True)
    print(
        f"{arguments.tokens} tokens, vocabulary {arguments.vocabulary}, hidden {arguments.hidden}, float32, 1 thread; "
        f"median [least, most] of {arguments.repeat} runs\n"
    )
    errors = {name: gradient_error(arguments.output, name) for name in (*PEERS, "leeway")}
    print_table(runs, errors)
    saving = json.loads(contender(Path(sys.executable), "saving", arguments.output, sizes).splitlines()[-1])
    print("\n1024 tokens, CPU s: all {all:.3f}, 30% zero {zeros:.3f}, scores only {scores:.3f}".format(**saving))
    promises = judge(runs, errors["leeway"], saving)
    print("\n" + "\n".join(map(str, promises)))
    return 0 if all(promise.kept for promise in promises) else 1


def environment(folder: Path) -> Path:
    """The peers' interpreter; installs it at the first run."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--requirement", str(REQUIREMENTS)], check=True)
    return python


def contender(python: Path, name: str, folder: Path, sizes: Sequence[str]) -> str:
    """Run one process; its standard output."""
    command = [str(python), "-W", "ignore", "-m", "benchmarks.loss_head_contender", name, str(folder.resolve()), *sizes]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, timeout=1800).stdout


def gradient_error(folder: Path, name: str) -> float:
    """|g - naive| / |naive|, the worst of both gradients (some rows of the weight's), L2 and in the largest element."""
    with np.load(folder / f"{name}.npz") as own, np.load(folder / "naive.npz") as naive:
        errors = [
            float(
                norm((own[key].astype(np.float64) - naive[key]).ravel()) / norm(naive[key].astype(np.float64).ravel())
            )
            for key in ("hidden", "weight")
            for norm in (np.linalg.norm, lambda x: np.abs(x).max())
        ]
    return max(errors)


def print_table(runs: dict[str, list[Run]], errors: dict[str, float]) -> None:
    """One row per contender."""
    limit = median(runs["products"], "cpu")
    print(f"{'':<16}{'CPU s':>21}{'x products':>12}{'elapsed s':>22}{'extra memory, MiB':>20}{'gradient error':>16}")
    for name, results in runs.items():
        memory = [result.extra_bytes / MEBIBYTE for result in results]
        print(
            f"{name:<16}{spread([r.cpu for r in results], '.2f'):>21}{median(results, 'cpu') / limit:>12.2f}"
            f"{spread([r.wall for r in results], '.2f'):>22}{spread(memory, '.0f'):>20}"
            + (f"{errors[name]:>16.1e}" if name in errors else "")
        )


def judge(runs: dict[str, list[Run]], error: float, saving: dict[str, float]) -> list[Promise]:
    """Medians against the targets, with TRL both as its trainer calls it and as functions on logits."""
    cpu = {name: median(results, "cpu") for name, results in runs.items()}
    memory = {name: median(results, "extra_bytes") for name, results in runs.items()}
    possible = ZERO_FRACTION * (saving["all"] - saving["scores"])
    return [
        *(Promise(f"extra memory of {trl}", memory["leeway"] / memory[trl], 1 / 8) for trl in PEERS[:2]),
        *(Promise(f"time of {trl}", cpu["leeway"] / cpu[trl], 0.9) for trl in PEERS[:2]),
        Promise("time of naive", cpu["leeway"] / cpu["naive"], 0.95),
        Promise("of the possible saving", (saving["all"] - saving["zeros"]) / possible, 0.7, at_least=True),
        Promise("relative gradient error", error, 1e-5),
    ]


def median(results: Sequence[Run], key: str) -> float:
    """Median of one figure."""
    return statistics.median(getattr(result, key) for result in results)


def spread(values: Sequence[float], layout: str) -> str:
    """Median [least, most]."""
    return f"{statistics.median(values):{layout}} [{min(values):{layout}}, {max(values):{layout}}]"


if __name__ == "__main__":
    sys.exit(main())
