"""Progress of `leeway run`: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Final

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


@contextmanager
def open_progress(run: RunOptions, *, plain: bool) -> Generator[Progress]:
    """Show progress for the duration of a `with` block."""
    if plain:
        yield Progress(run)
        return
    with Live(console=Console(stderr=True), refresh_per_second=4, transient=False) as live:
        yield LiveProgress(run, live)


class Progress:
    """A line every few seconds, and one for each evaluation and event; figures are means over the last steps."""

    def __init__(self, run: RunOptions) -> None:
        self._run = run
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._last_line_at = float("-inf")
        self._step = 0
        self._elapsed_seconds = 0.0
        self._rewards: list[float] = []
        self._evaluations: list[tuple[int, float]] = []
        self._recent: deque[Mapping[str, Any]] = deque(maxlen=_WINDOW_STEPS)

    def on_journal_line(self, line: str) -> None:
        """A record of the learner's journal."""
        record = json.loads(line)
        self._elapsed_seconds = record["elapsed_seconds"]
        match record["kind"]:
            case "drain":
                self.on_event(f"{record['server']} is drained ({record['reason']}): {record['message']}")
            case "evaluation":
                self._evaluations.append((record["step"], record["reward_mean"]))
                self._evaluated(record)
            case _:
                self._step = record["step"]
                self._rewards.append(record["reward_mean"])
                self._recent.append(record)
                self._stepped()

    def on_event(self, message: str) -> None:
        """Something to be seen, such as a restart."""
        self._console.print(message)

    def _evaluated(self, record: Mapping[str, Any]) -> None:
        self._console.print(
            f"step {record['step']}: held-out reward {record['reward_mean']:.3f} over {record['draws']} draws"
        )

    def _stepped(self) -> None:
        if time.monotonic() - self._last_line_at >= _PLAIN_LINE_SECONDS or self._step == self._run.steps:
            self._last_line_at = time.monotonic()
            reward, staleness, speed, idle = self._figures()
            self._console.print(
                f"step {self._step}/{self._run.steps}  reward {reward:.3f}  staleness {staleness:.2f}  "
                f"{speed:.0f} tokens/s  learner idle {idle:.0%}  {self._elapsed_seconds:.0f} s"
            )

    def _figures(self) -> tuple[float, float, float, float]:
        """Reward, staleness, trained tokens per second, and the part of the time that the learner waited."""
        if not self._recent:
            return 0.0, 0.0, 0.0, 0.0
        rewards = self._rewards[-_WINDOW_STEPS:]
        counts = [(int(key), count) for each in self._recent for key, count in each["staleness_histogram"].items()]
        tokens = sum(count for _, count in counts)
        first = self._recent[0]
        began = first["elapsed_seconds"] - first["step_seconds"] - first["batch_wait_seconds"]
        seconds = max(self._recent[-1]["elapsed_seconds"] - began, 1e-9)
        return (
            sum(rewards) / len(rewards),
            sum(steps * count for steps, count in counts) / max(tokens, 1),
            tokens / seconds,
            sum(record["batch_wait_seconds"] for record in self._recent) / seconds,
        )


class LiveProgress(Progress):
    """A panel that is redrawn in place; events scroll above it."""

    def __init__(self, run: RunOptions, live: Live) -> None:
        super().__init__(run)
        self._live = live
        self._stepped()

    def on_event(self, message: str) -> None:
        self._live.console.print(Text(message, style="yellow"))

    def _evaluated(self, record: Mapping[str, Any]) -> None:
        self._stepped()

    def _stepped(self) -> None:
        reward, staleness, speed, idle = self._figures()
        table = Table.grid(padding=(0, 2))
        table.add_column(justify="right", style="dim")
        table.add_column()
        table.add_row("reward", Text.assemble((f"{reward:.3f}  ", "bold"), (_spark(self._rewards), "cyan")))
        table.add_row("held-out", _trail(self._evaluations))
        table.add_row("staleness", f"{staleness:.2f} steps (bound {self._run.max_staleness})")
        table.add_row("speed", f"{speed:.0f} trained tokens/s, learner idle {idle:.0%}")
        bar = ProgressBar(total=self._run.steps, completed=self._step, width=_SPARK_WIDTH)
        waiting = "" if self._step else "starting: services load the model"
        title = f"{self._run.name}  step {self._step}/{self._run.steps}  {self._elapsed_seconds:.0f} s"
        self._live.update(Panel(Group(bar, Text(waiting, style="dim"), table), title=title, title_align="left"))


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
