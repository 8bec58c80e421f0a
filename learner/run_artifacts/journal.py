"""The files of a run that people read: journal, the learner's log-probs, summary.

    metrics.jsonl                                 one line per step, evaluation and drained server
    policy_logprobs/step-NNNNNNNN.safetensors     trajectory id -> float32 [tokens in the loss], before the step
    summary.json                                  results of the run, from the journal and the replay buffer's counts

The journal tells the surviving history only: a learner that resumes at step s drops what an abandoned branch wrote
beyond s, so the file always reads as one curve.
"""

from __future__ import annotations

import json
import os
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import numpy as safetensors_numpy

from leeway.service.durable import replace_file
from leeway.types import Float32Array, RunStatus


class Journal:
    """Appends records; each has `kind` ("step" or "evaluation") and `step`."""

    def __init__(self, path: Path, *, resume_step: int, listen: Callable[[str], None] | None = None) -> None:
        """Open `path`, keeping records up to `resume_step`; `listen` is told each new line."""
        self._listen = listen
        self.records = [record for record in read_journal(path) if record["step"] <= resume_step]
        replace_file(path, "".join(_line(record) for record in self.records))
        self._file = path.open("a", encoding="utf-8")

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record and pass it on."""
        self.records.append(dict(record))
        line = _line(record)
        self._file.write(line)
        self._file.flush()
        if self._listen is not None:
            self._listen(line)

    def sync(self) -> None:
        """Make what was written durable; called with each checkpoint."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Every whole record of a journal; it ends where a crash has torn it."""
    if not path.exists():
        return []
    records: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            records.append(json.loads(line[: line.index(b"\n")]))
        except ValueError:
            break
    return records


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def policy_logprobs_path(run_directory: Path, step: int) -> Path:
    """The file of one step."""
    return run_directory / "policy_logprobs" / f"step-{step:08d}.safetensors"


def write_policy_logprobs(run_directory: Path, step: int, logprobs: Mapping[str, Float32Array]) -> None:
    """Write one step's file, replacing one of an abandoned branch."""
    path = policy_logprobs_path(run_directory, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors_numpy.save_file(dict(logprobs), path)


def read_policy_logprobs(run_directory: Path, step: int) -> dict[str, Float32Array]:
    """One step's log-probs; empty when none were kept."""
    path = policy_logprobs_path(run_directory, step)
    return safetensors_numpy.load_file(path) if path.exists() else {}


Interval = tuple[float, float]
"""[start, end) in seconds"""


def merge_intervals(intervals: Sequence[Interval]) -> list[Interval]:
    """The union of intervals as disjoint ones, ascending."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def overlap_seconds(left: Sequence[Interval], right: Sequence[Interval]) -> float:
    """Length of the intersection of two unions of intervals.

    >>> overlap_seconds([(0, 4), (3, 6)], [(5, 9)])
    1
    """
    a, b = merge_intervals(left), merge_intervals(right)
    total: float = 0
    i = j = 0
    while i < len(a) and j < len(b):
        total += max(0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] <= b[j][1]:
            i += 1
        else:
            j += 1
    return total


def summarize(records: Sequence[Mapping[str, Any]], status: RunStatus, push_seconds: Sequence[float]) -> dict[str, Any]:
    """The summary of a run.

    Args:
        records: the journal.
        status: the buffer's counts after the run.
        push_seconds: announcement to acknowledgement, for each version and server of this incarnation.
    """
    steps = [record for record in records if record["kind"] == "step"]
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    staleness: Counter[str] = Counter()
    for record in steps:
        staleness.update(record["staleness_histogram"])
    wall_seconds = max((record["elapsed_seconds"] for record in records), default=0.0)
    trained_tokens = sum(staleness.values())
    waited = sum(record["batch_wait_seconds"] for record in steps)
    generation = [tuple(interval) for record in steps for interval in record["generation_intervals"]]
    training = [tuple(record["training_interval"]) for record in steps]
    return {
        "run": status.spec.run,
        "steps": len(steps),
        "finished": status.finished,
        "heldout_before": evaluations[0]["reward_mean"] if evaluations else None,
        "heldout_after": evaluations[-1]["reward_mean"] if evaluations else None,
        "heldout_draws": evaluations[-1]["draws"] if evaluations else 0,
        "reward_first_20_steps": _mean([record["reward_mean"] for record in steps[:20]]),
        "reward_last_20_steps": _mean([record["reward_mean"] for record in steps[-20:]]),
        "wall_seconds": wall_seconds,
        "tokens_per_second": trained_tokens / wall_seconds if wall_seconds else 0.0,
        "trained_tokens": trained_tokens,
        "max_staleness": status.spec.max_staleness,
        "staleness_histogram": dict(sorted(staleness.items(), key=lambda item: int(item[0]))),
        "stale_token_fraction": 1 - staleness["0"] / trained_tokens if trained_tokens else 0.0,
        "learner_idle_fraction": waited / wall_seconds if wall_seconds else 0.0,
        "overlap_seconds": overlap_seconds(generation, training),
        "generation_seconds": sum(end - start for start, end in merge_intervals(generation)),
        "training_seconds": sum(end - start for start, end in training),
        "weight_push_seconds": {
            "count": len(push_seconds),
            "median": statistics.median(push_seconds) if push_seconds else None,
            "max": max(push_seconds, default=None),
        },
        "groups_issued": status.issued,
        "groups_consumed": status.consumed,
        "dropped_groups": {reason.name.lower(): count for reason, count in status.dropped.items() if count},
        "drained_servers": [
            {key: record[key] for key in ("step", "server", "reason", "message")}
            for record in records
            if record["kind"] == "drain"
        ],
        "learner_epochs": status.epoch,
    }


def write_summary(directory: Path, summary: Mapping[str, Any]) -> None:
    """Write a summary into the run's folder."""
    replace_file(directory / "summary.json", json.dumps(summary, indent=1) + "\n")


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None
