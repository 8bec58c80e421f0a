"""Tables of medians, and whether what was promised is kept."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from benchmarks.replay_buffer.contenders import Sample


class Key(NamedTuple):
    """What was measured."""

    workload: str
    count: int
    per_message: int
    contender: str
    op: str = ""


@dataclass(slots=True)
class Results:
    """Samples of every repetition."""

    samples: defaultdict[Key, list[Sample]] = field(default_factory=lambda: defaultdict(list))
    durability: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def rate(self, key: Key) -> float | None:
        """Median trajectories per second."""
        samples = self.samples.get(key)
        return statistics.median(key.count / sample.seconds for sample in samples) if samples else None

    def ratio(self, key: Key, other: Key) -> float | None:
        """Median over repetitions of the ratio of two rates of the same repetition."""
        ours, theirs = self.samples.get(key), self.samples.get(other)
        if not ours or not theirs:
            return None
        return statistics.median(two.seconds / one.seconds for one, two in zip(ours, theirs, strict=True))

    def micros(self, key: Key, which: Callable[[Sample], float]) -> float:
        """Median CPU microseconds per trajectory."""
        return statistics.median(1e6 * which(sample) / key.count for sample in self.samples[key])


def print_table(results: Results, reference: str) -> None:
    """One line per size, message size, operation and contender."""
    for name, durability in results.durability.items():
        print(f"  {name:18} durability: {durability}")
    for name, reason in results.missing.items():
        print(f"  {name:18} left out: {reason}")
    print(
        f"\n{'size':>7} {'/msg':>4}  {'operation':9}  {'contender':18} {'per second':>10} {'of bare':>8} "
        f"{'MB/s':>7} {'server us':>10} {'client us':>10}"
    )
    sizes = {"7 KB": 7e-3, "69 KB": 69e-3, "190 KB": 0.19, "9 MB": 9.0}
    for key in sorted(
        results.samples,
        key=lambda key: (
            list(sizes).index(key.workload),
            key.per_message,
            ["insert", "draw", "assembled"].index(key.op),
        ),
    ):
        base = key._replace(contender=reference, op="draw" if key.op == "assembled" else key.op)
        rate, ratio = results.rate(key), results.ratio(key, base)
        assert rate is not None
        print(
            f"{key.workload:>7} {key.per_message:>4}  {key.op:9}  {key.contender:18} {rate:>10.0f} "
            f"{'' if ratio is None else f'{ratio:.2f}':>8} {rate * sizes[key.workload]:>7.0f} "
            f"{results.micros(key, lambda sample: sample.server_cpu_seconds):>10.0f} "
            f"{results.micros(key, lambda sample: sample.client_cpu_seconds):>10.0f}"
        )


def verdict(what: str, figure: float | None, least: float, *, unit: str = "x") -> bool:
    """Print a promise with its honest figure; true when it is kept or could not be measured."""
    if figure is None:
        print(f"not measured   {what}")
        return True
    kept = figure >= least
    print(f"promise {'kept    ' if kept else 'NOT kept'}  {what}: {figure:.2f}{unit} (promised {least:g}{unit})")
    return kept
