"""The curves of a report as inline SVG. The only module that imports matplotlib."""

# pyright: reportUnknownMemberType=false
# matplotlib's own types are partial.

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final, cast

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Records = Sequence[Mapping[str, Any]]

_STYLE: Final = {
    "svg.fonttype": "path",  # the same picture on every machine
    "svg.hashsalt": "leeway",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": "#51606f",
    "xtick.color": "#51606f",
    "ytick.color": "#51606f",
    "axes.grid": True,
    "grid.color": "#e9edf1",
    "legend.frameon": False,
}
_TEAL, _ORANGE, _GREY = "#0b7285", "#e8590c", "#868e96"
_STALENESS_COLORS: Final = ("#c5e8ef", "#66bfd0", "#0b7285", "#084c59", "#3b2f63", "#862e9c")
_WINDOW_STEPS: Final = 10


def draw_curves(records: Records) -> Iterator[tuple[str, str]]:
    """(caption, SVG) of each curve."""
    steps = [record for record in records if record["kind"] == "step"]
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    yield "Reward: training batches and held-out tasks", _draw(partial(_reward, steps=steps, evaluations=evaluations))
    yield "Staleness of trained tokens", _draw(partial(_staleness, steps=steps))
    if all("mean_abs_policy_behavior_difference" in record for record in steps):
        yield "Learner and behavior policy: mean |pi - mu| of a batch", _draw(partial(_mismatch, steps=steps))
    yield "Where a step's time goes", _draw(partial(_time, steps=steps))


def draw_reward_curve(records: Records) -> str:
    """The reward curve alone, as SVG on white."""
    steps = [record for record in records if record["kind"] == "step"]
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    return _draw(partial(_reward, steps=steps, evaluations=evaluations), background="white")


def _draw(paint: Callable[[Axes], None], background: str = "none") -> str:
    with mpl.rc_context(cast("dict[Any, Any]", _STYLE)):  # pyright: ignore[reportUnknownVariableType]
        figure = Figure(facecolor=background, figsize=(6.2, 3.1), layout="constrained")
        axes = figure.subplots()
        axes.set_facecolor(background)
        paint(axes)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0.01)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", facecolor=background, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]


def _reward(axes: Axes, steps: Records, evaluations: Records) -> None:
    x, rewards = _series(steps, "reward_mean")
    axes.plot(x, rewards, color=_TEAL, alpha=0.25, linewidth=0.8)
    axes.plot(x, _smooth(rewards), color=_TEAL, linewidth=1.8, label=f"training, mean of {_WINDOW_STEPS} steps")
    if evaluations:
        axes.plot(
            *_series(evaluations, "reward_mean"), "o-", color=_ORANGE, linewidth=1.5, markersize=4, label="held-out"
        )
    axes.set_ylim(0, max(1.0, float(np.max(rewards))))
    axes.legend(loc="lower right")


def _staleness(axes: Axes, steps: Records) -> None:
    x = np.array([record["step"] for record in steps])
    levels = sorted({int(key) for record in steps for key in record["staleness_histogram"]})
    counts = np.array(
        [[record["staleness_histogram"].get(str(level), 0) for record in steps] for level in levels], float
    )
    shares = counts / np.maximum(counts.sum(axis=0), 1)
    colors = [_STALENESS_COLORS[min(level, len(_STALENESS_COLORS) - 1)] for level in levels]
    axes.stackplot(x, shares, colors=colors, labels=[f"{level} steps" for level in levels])
    axes.set_ylim(0, 1)
    axes.set_ylabel("share of tokens")
    axes.legend(loc="upper right", ncols=len(levels), frameon=True, framealpha=0.9, edgecolor="none")


def _mismatch(axes: Axes, steps: Records) -> None:
    x, difference = _series(steps, "mean_abs_policy_behavior_difference")
    axes.plot(x, difference, color=_TEAL, alpha=0.25, linewidth=0.8)
    axes.plot(x, _smooth(difference), color=_TEAL, linewidth=1.8, label="mean |pi - mu|")
    axes.set_ylim(0, 1.35 * max(float(np.max(difference)), 1e-6))  # room for the legend
    masked = axes.twinx()
    _, fraction = _series(steps, "masked_fraction")
    masked.plot(x, _smooth(fraction), color=_ORANGE, linewidth=1.5, label="masked fraction (right)")
    masked.set_ylim(0, 1.35 * max(float(np.max(_smooth(fraction))), 1e-3))
    masked.grid(visible=False)
    lines = [*axes.get_lines()[1:], *masked.get_lines()]
    axes.legend(lines, [str(line.get_label()) for line in lines], loc="upper right")


def _time(axes: Axes, steps: Records) -> None:
    x, training = _series(steps, "step_seconds")
    _, waiting = _series(steps, "batch_wait_seconds")
    axes.stackplot(
        x, _smooth(training), _smooth(waiting), colors=[_TEAL, "#dee2e6"], labels=["training", "waiting for a batch"]
    )
    axes.set_ylabel("seconds")
    axes.legend(loc="upper right", frameon=True, framealpha=0.9, edgecolor="none")


def _series(records: Records, key: str) -> tuple[np.ndarray, np.ndarray]:
    present = [record for record in records if key in record]
    return np.array([record["step"] for record in present]), np.array([record[key] for record in present], float)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over the last steps."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - _WINDOW_STEPS, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)
