"""What happens to a chaos suite, and what has happened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.chaos.weather import TEMPERATE, Climate
from tests.harness.disks import Losses

BUFFER, LEARNER, SERVERS = "replay-buffer", "learner", ("server-0", "server-1")

RETENTIONS: Final[tuple[tuple[str, ...], ...]] = (
    (),
    ("replay_buffer.retain_bytes=0",),
    ("replay_buffer.retain_seconds=3600",),  # clocks jump by more
)

EVENTS: Final = (
    ("any", 60),
    ("write.sent", 40),
    ("write.answered", 40),
    ("AcquireTickets.begun", 6),
    ("AcquireTickets.ended", 6),
    ("DrawBatch.begun", 3),
    ("DrawBatch.ended", 3),
    ("Advance.begun", 3),
    ("Advance.ended", 3),
    ("Commit.begun", 1),
    ("Commit.ended", 1),
    ("OpenRun.begun", 1),
    ("OpenRun.ended", 1),
    ("JoinRun.ended", 1),
    ("CreateEvaluation.ended", 1),
    ("WatchPolicy.ended", 4),
    ("FetchWeights.begun", 4),
)
"""Crash points, and how many of their kind may pass first at most."""


VICTIMS: Final = ((BUFFER, 3.0), (LEARNER, 2.0), (SERVERS[0], 2.0), (SERVERS[1], 2.0), ("all", 0.5))


@dataclass(frozen=True)
class Plan:
    """What happens to a suite."""

    seed: int
    kills: int
    directory: Path
    victims: tuple[tuple[str, float], ...] = VICTIMS
    """Who is struck, and how likely."""
    events: tuple[tuple[str, int], ...] = EVENTS
    strike_seconds: float = 3.0  # a crash point that is not reached within this time is struck all the same
    stops: float = 0.2  # share of strikes that only stop a process for a while
    hardships: float = 0.0  # share of strikes with which a clock jumps, or the disk fills up for a while
    retentions: tuple[tuple[str, ...], ...] = ((),)
    """One of these for each run: options by which the buffer retires what nothing needs."""
    merciless: bool = False  # whether a loss of power takes all that was not synced, not what chance will have
    rollbacks: float = 0.0  # share of strikes with which a person returns the run to an older checkpoint
    kills_per_run: int = 20
    steps: int = 30
    step_seconds: float = 120.0  # when faults have ended, each step comes within this time
    overrides: tuple[str, ...] = ()
    climate: Climate = TEMPERATE
    plant: Callable[[str], Callable[[], None] | None] = lambda _: None
    """What a process does first, by name: the planted bugs."""


@dataclass
class Tally:
    """What happened, over all runs."""

    runs: int = 0
    kills: Counter[str] = field(default_factory=Counter[str])
    faults: Counter[str] = field(default_factory=Counter[str])
    checked: Counter[str] = field(default_factory=Counter[str])
    losses: Losses = field(default_factory=Losses)
    violations: list[str] = field(default_factory=list[str])

    def lines(self) -> list[str]:
        """For people; the last line has the counts."""
        by_number = Counter(int(line.partition(":")[0]) for line in self.violations)
        kills = ", ".join(f"{name} {count}" for name, count in sorted(self.kills.items()))
        faults = ", ".join(f"{name} {count}" for name, count in sorted(self.faults.items()))
        checked = ", ".join(f"{name} {count}" for name, count in sorted(self.checked.items()))
        losses = self.losses
        return [
            *self.violations,
            f"runs {self.runs}; checked: {checked}",
            f"disk: {losses.discarded_bytes} bytes discarded, {losses.torn_files} files torn, "
            f"{losses.lost_names} names lost, {losses.undone_removals} removals undone",
            f"kills {self.kills.total()} ({kills}); faults: {faults}; "
            f"violations: {' '.join(f'{number}:{by_number[number]}' for number in range(1, 13))}",
        ]
