"""Reports of each step, evaluation and drained server, in journal, receipts and metrics."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from learner.fleet.watch import Verdict
from learner.lineage import Branch
from learner.loop.context import Context
from learner.run_artifacts.journal import merge_intervals, write_policy_logprobs
from learner.run_artifacts.receipts import make_receipt
from learner.trainer import StepResult
from leeway.service.metrics import STALENESS_BUCKETS
from leeway.types import EvaluationResult, PolicyVersion, TrajectoryGroup, WeightManifest


@dataclass(frozen=True, slots=True)
class Trained:
    """One optimizer step that was taken."""

    groups: Sequence[TrajectoryGroup]
    result: StepResult
    staleness: Counter[int]  # tokens in the loss, by optimizer steps
    batch_wait_seconds: float
    started_at: float  # Unix seconds
    step_seconds: float


class Reports:
    """Writes the reports of one incarnation of the learner."""

    def __init__(self, context: Context, *, policy_logprobs: bool) -> None:
        self._context = context
        self._policy_logprobs = policy_logprobs
        earlier_seconds = max((record["elapsed_seconds"] for record in context.journal.records), default=0.0)
        self._clock_started = time.monotonic() - earlier_seconds

    def stepped(
        self,
        parent: PolicyVersion,
        head: PolicyVersion,
        branches: Sequence[Branch],
        manifest: WeightManifest,
        trained: Trained,
    ) -> None:
        """A step led from `parent` to `head`, whose weights `manifest` names."""
        receipts, statistics = self._context.receipts, trained.result.statistics
        rewards = reward_by_tag(trained.groups, self._context.task_tags)
        receipts.append(make_receipt(receipts.options, branches, parent, head, trained.groups, statistics, manifest))
        if self._policy_logprobs:
            write_policy_logprobs(self._context.run_directory, head.step, trained.result.policy_logprobs)
        self._record(
            {
                "kind": "step",
                "step": head.step,
                "version": str(head),
                **statistics,
                **({"reward_by_tag": rewards} if rewards else {}),
                "staleness_histogram": {str(key): count for key, count in sorted(trained.staleness.items())},
                "batch_wait_seconds": trained.batch_wait_seconds,
                "step_seconds": trained.step_seconds,
                "training_interval": [trained.started_at, trained.started_at + trained.step_seconds],
                "generation_intervals": _generation_intervals(trained.groups),
            }
        )
        self._observe(head.step, trained, rewards)

    def _observe(self, step: int, trained: Trained, rewards: Mapping[str, float]) -> None:
        metrics = self._context.metrics
        metrics.step.set(step)
        metrics.step_seconds.observe(trained.step_seconds)
        metrics.batch_wait_seconds.observe(trained.batch_wait_seconds)
        for name, value in trained.result.statistics.items():
            metrics.statistic.labels(name).set(value)
        for tag, value in rewards.items():
            metrics.tag_reward.labels(tag).set(value)
        for steps, num_tokens in trained.staleness.items():
            bucket = max(bound for bound in STALENESS_BUCKETS if bound <= steps)
            metrics.trained_tokens.labels(str(bucket)).inc(num_tokens)

    def evaluated(self, version: PolicyVersion, result: EvaluationResult) -> None:
        """An evaluation is complete."""
        mean = sum(result.rewards) / len(result.rewards)
        self._context.metrics.heldout_reward.set(mean)
        self._record(
            {
                "kind": "evaluation",
                "step": version.step,
                "version": str(version),
                "reward_mean": mean,
                "draws": len(result.rewards),
                "failed": result.failed,
            }
        )

    def has_evaluation(self, step: int) -> bool:
        """True where this incarnation or an earlier one measured the version of `step`."""
        records = self._context.journal.records
        return any(record["kind"] == "evaluation" and record["step"] == step for record in records)

    def drained(self, step: int, verdict: Verdict) -> None:
        """A server was taken out of the run while `step` was the head."""
        self._record(
            {
                "kind": "drain",
                "step": step,
                "server": verdict.server_id,
                "reason": verdict.reason.name.lower(),
                "message": verdict.message,
            }
        )

    def _record(self, record: dict[str, Any]) -> None:
        self._context.journal.append({**record, "elapsed_seconds": time.monotonic() - self._clock_started})


def reward_by_tag(groups: Sequence[TrajectoryGroup], task_tags: Callable[[int], Sequence[str]]) -> dict[str, float]:
    """The mean reward of a step's trajectories for each tag of their tasks; a task with two tags counts for both."""
    rewards: defaultdict[str, list[float]] = defaultdict(list)
    for group in groups:
        for tag in set(task_tags(group.task_index)):
            rewards[tag] += [trajectory.reward for trajectory in group.trajectories]
    return {tag: sum(values) / len(values) for tag, values in sorted(rewards.items())}


def _generation_intervals(groups: Sequence[TrajectoryGroup]) -> list[tuple[float, float]]:
    """When the batch's tokens were sampled, by the engines' clocks: disjoint [start, end) in Unix seconds."""
    return merge_intervals(
        [
            (trajectory.generation_started_at.timestamp(), trajectory.generation_finished_at.timestamp())
            for group in groups
            for trajectory in group.trajectories
        ]
    )
