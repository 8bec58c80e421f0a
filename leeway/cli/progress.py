"""Progress of `leeway run`: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Final, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from leeway.config import RunOptions

_PLAIN_LINE_SECONDS: Final = 5.0
_WINDOW_STEPS: Final = 20
_SPARK_WIDTH: Final = 60
_BLOCKS: Final = "▁▂▃▄▅▆▇█"


class Progress(Protocol):
    """Told of each journal line and each event."""

    def on_journal_line(self, line: str) -> None:
        """A record of the learner's journal."""
        ...

    def on_event(self, message: str) -> None:
        """Something a person should see, such as a restart."""
        ...


@contextmanager
def open_progress(run: RunOptions, *, plain: bool) -> Generator[Progress]:
    """Show progress for the duration of a `with` block."""
    if plain:
        yield _PlainProgress(run)
        return
    console = Console(stderr=True)
    with Live(console=console, refresh_per_second=4, transient=False) as live:
        yield _LiveProgress(run, live)


class _Figures:
    """The newest figures, averaged over the last steps."""

    def __init__(self, run: RunOptions) -> None:
        self.run = run
        self.step = 0
        self.elapsed_seconds = 0.0
        self.rewards: list[float] = []
        self.evaluations: list[tuple[int, float]] = []
        self._recent: deque[Mapping[str, Any]] = deque(maxlen=_WINDOW_STEPS)

    def add(self, record: Mapping[str, Any]) -> None:
        self.elapsed_seconds = record["elapsed_seconds"]
        if record["kind"] == "drain":
            return
        if record["kind"] == "evaluation":
            self.evaluations.append((record["step"], record["reward_mean"]))
            return
        self.step = record["step"]
        self.rewards.append(record["reward_mean"])
        self._recent.append(record)

    @property
    def reward(self) -> float:
        recent = self.rewards[-_WINDOW_STEPS:]
        return sum(recent) / len(recent) if recent else 0.0

    @property
    def staleness(self) -> float:
        tokens = steps = 0
        for record in self._recent:
            for key, count in record["staleness_histogram"].items():
                tokens += count
                steps += int(key) * count
        return steps / tokens if tokens else 0.0

    @property
    def tokens_per_second(self) -> float:
        tokens = sum(sum(record["staleness_histogram"].values()) for record in self._recent)
        return tokens / self._window_seconds

    @property
    def idle_fraction(self) -> float:
        return sum(record["batch_wait_seconds"] for record in self._recent) / self._window_seconds

    @property
    def _window_seconds(self) -> float:
        if not self._recent:
            return 1.0
        first = self._recent[0]
        began = first["elapsed_seconds"] - first["step_seconds"] - first["batch_wait_seconds"]
        return max(self._recent[-1]["elapsed_seconds"] - began, 1e-9)


class _PlainProgress:
    """A line every few seconds, and one per evaluation and event."""

    def __init__(self, run: RunOptions) -> None:
        self._figures = _Figures(run)
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._last_line_at = float("-inf")

    def on_journal_line(self, line: str) -> None:
        record = json.loads(line)
        figures = self._figures
        figures.add(record)
        if record["kind"] == "drain":
            self._console.print(_drained(record))
        elif record["kind"] == "evaluation":
            self._console.print(
                f"step {record['step']}: held-out reward {record['reward_mean']:.3f} over {record['draws']} draws"
            )
        elif time.monotonic() - self._last_line_at >= _PLAIN_LINE_SECONDS or figures.step == figures.run.steps:
            self._last_line_at = time.monotonic()
            self._console.print(
                f"step {figures.step}/{figures.run.steps}  reward {figures.reward:.3f}  "
                f"staleness {figures.staleness:.2f}  {figures.tokens_per_second:.0f} tokens/s  "
                f"learner idle {figures.idle_fraction:.0%}  {figures.elapsed_seconds:.0f} s"
            )

    def on_event(self, message: str) -> None:
        self._console.print(message)


class _LiveProgress:
    """A panel that is redrawn in place; events scroll above it."""

    def __init__(self, run: RunOptions, live: Live) -> None:
        self._figures = _Figures(run)
        self._live = live
        self._draw()

    def on_journal_line(self, line: str) -> None:
        record = json.loads(line)
        self._figures.add(record)
        if record["kind"] == "drain":
            self.on_event(_drained(record))
        self._draw()

    def on_event(self, message: str) -> None:
        self._live.console.print(Text(message, style="yellow"))

    def _draw(self) -> None:
        figures = self._figures
        table = Table.grid(padding=(0, 2))
        table.add_column(justify="right", style="dim")
        table.add_column()
        table.add_row("reward", Text.assemble((f"{figures.reward:.3f}  ", "bold"), (_spark(figures.rewards), "cyan")))
        table.add_row("held-out", _trail(figures.evaluations))
        table.add_row("staleness", f"{figures.staleness:.2f} steps (bound {figures.run.max_staleness})")
        table.add_row(
            "speed", f"{figures.tokens_per_second:.0f} trained tokens/s, learner idle {figures.idle_fraction:.0%}"
        )
        bar = ProgressBar(total=figures.run.steps, completed=figures.step, width=_SPARK_WIDTH)
        waiting = "" if figures.step else "starting: services load the model"
        title = f"{figures.run.name}  step {figures.step}/{figures.run.steps}  {figures.elapsed_seconds:.0f} s"
        self._live.update(Panel(Group(bar, Text(waiting, style="dim"), table), title=title, title_align="left"))


def _drained(record: Mapping[str, Any]) -> str:
    return f"{record['server']} is drained ({record['reason']}): {record['message']}"


def _spark(values: list[float]) -> str:
    """Values, averaged to the display's width, as block characters between their extremes."""
    if not values:
        return ""
    width = min(_SPARK_WIDTH, len(values))
    edges = [round(index * len(values) / width) for index in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((mean - low) * scale)] for mean in means)


def _trail(evaluations: list[tuple[int, float]]) -> Text:
    if not evaluations:
        return Text("waiting for the first evaluation", style="dim")
    text = Text()
    for index, (step, reward) in enumerate(evaluations[-6:]):
        text.append(" → " if index else "", style="dim")
        text.append(f"{reward:.3f}", style="bold green")
        text.append(f" @{step}", style="dim")
    return text
