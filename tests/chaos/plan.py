"""The plan of a chaos suite: which faults, how many, how often; and the tally of what happened."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.chaos.network_faults import USUAL_FAULTS, FaultRates
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
    """The faults of a suite, and the shape of its runs."""

    seed: int
    kills: int
    directory: Path
    victims: tuple[tuple[str, float], ...] = VICTIMS
    """Processes that are killed or stopped, and their weights."""
    events: tuple[tuple[str, int], ...] = EVENTS
    kill_seconds: float = 3.0  # a crash point that is not reached within this time is not waited for
    stops: float = 0.2  # share of kills that only stop a process for a while
    clock_and_disk: float = 0.0  # share of kills with which a clock jumps, or the disk fills up for a while
    retentions: tuple[tuple[str, ...], ...] = ((),)
    """One of these for each run: options by which the buffer retires what nothing needs."""
    lose_all: bool = False  # whether a loss of power takes all that was not synced, or a random part of it
    rollbacks: float = 0.0  # share of kills with which a person returns the run to an older checkpoint
    kills_per_run: int = 20
    steps: int = 30
    step_seconds: float = 120.0  # when faults have ended, each step comes within this time
    overrides: tuple[str, ...] = ()
    rates: FaultRates = USUAL_FAULTS
    bug: str = ""
    """The planted bug, and the process that has it."""
    bug_process: str = ""


@dataclass
class Tally:
    """The faults, checks and violations of all runs."""

    runs: int = 0
    kills: Counter[str] = field(default_factory=Counter[str])
    faults: Counter[str] = field(default_factory=Counter[str])
    checked: Counter[str] = field(default_factory=Counter[str])
    losses: Losses = field(default_factory=Losses)
    violations: list[str] = field(default_factory=list[str])

    def lines(self) -> list[str]:
        """The report; its last line has the counts."""
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
