"""The trajectories of a step with everything the loss needs to know of them before the model is asked.

    groups ──> rewards ── shape (over-long rules) ──> advantages
       └─────> lengths ── aggregation ──> weights          what depends on the whole step is computed from the numbers
       └─────> version spans ──> staleness                 of all ranks

Shape legend: N trajectories that this rank trains on, all groups one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from learner.batch.advantages import group_advantages
from learner.batch.overlong import ShapedGroup, is_overlong, shape_group, soft_penalty
from learner.batch.packing import MicroBatch, pack, plan_micro_batches
from learner.errors import UnusableGroupError
from learner.lineage import trajectory_staleness
from learner.losses.aggregation import sequence_weights
from learner.records.checkpoint import Branch
from learner.training.statistics import group_statistics
from learner.training.world import World, gather_arrays
from leeway.config import TrainingOptions
from leeway.types import Trajectory, TrajectoryGroup


@dataclass(frozen=True, slots=True)
class StepBatch:
    """What a rank trains on in one step."""

    group_ids: tuple[str, ...]  # [N]
    trajectories: tuple[Trajectory, ...]  # [N]
    advantages: NDArray[np.float64]  # [N]
    weights: NDArray[np.float64]  # [N] of each trajectory's summed token loss
    staleness: tuple[NDArray[np.int64], ...]  # [N] arrays, one entry per token
    statistics: Mapping[str, float]  # of all ranks
    first: int  # this rank's first trajectory among those of all ranks
    num_sequences: int  # of all ranks

    def blame(self, sequence: int, message: str) -> UnusableGroupError:
        """The error that names a trajectory and its group."""
        trajectory_id = self.trajectories[sequence].trajectory_id
        return UnusableGroupError(self.group_ids[sequence], f"trajectory {trajectory_id} {message}")

    def micro_batches(
        self, chosen: NDArray[np.bool_], options: TrainingOptions, *, with_routing: bool, topk: int
    ) -> list[MicroBatch]:
        """Pack the chosen trajectories [N], with their recorded routing and `topk` candidates where wished."""
        indices = np.flatnonzero(chosen).tolist()
        lengths = [self.trajectories[index].num_tokens for index in indices]
        return [
            pack(
                [[indices[place] for place in row] for row in rows],
                self.trajectories,
                with_routing=with_routing,
                topk=topk,
                staleness=self.staleness,
            )
            for rows in plan_micro_batches(lengths, options.row_tokens, options.micro_batch_tokens)
        ]

    def shortest(self) -> NDArray[np.bool_]:
        """[N] true at the shortest trajectory."""
        chosen: NDArray[np.bool_] = np.arange(len(self.trajectories)) == np.argmin(
            [trajectory.num_tokens for trajectory in self.trajectories]
        )
        return chosen


def step_batch(
    groups: Sequence[TrajectoryGroup],
    version_step: int,
    branches: Sequence[Branch],
    options: TrainingOptions,
    world: World,
) -> StepBatch:
    """Give every trajectory of checked groups its advantage, weight and staleness.

    Args:
        groups: of this rank, at least one.
        version_step: the step of the version that is being trained.
        branches: the surviving history of that version.
        options: over-long rules, baseline, aggregation.
        world: the ranks that share the step.
    """
    rewards = [np.array([t.reward for t in group.trajectories]) for group in groups]
    shaped = [_shape(group, r, options) for group, r in zip(groups, rewards, strict=True)]
    advantages = [group.advantages for group in shaped]
    trajectories = tuple(trajectory for group in groups for trajectory in group.trajectories)
    trained_lengths = np.array([int(t.loss_mask.sum()) for t in trajectories], dtype=np.int64)
    num_tokens = np.array([t.num_tokens for t in trajectories], dtype=np.int64)
    overlong = np.array([is_overlong(t) for t in trajectories], dtype=np.bool_)
    everyone = world.gather(trained_lengths)
    first = sum(len(lengths) for lengths in everyone[: world.rank])
    here = slice(first, first + len(trajectories))
    all_lengths = np.concatenate(everyone)
    counted = np.concatenate(world.gather(np.concatenate([group.counted for group in shaped])))
    return StepBatch(
        group_ids=tuple(group.group_id for group in groups for _ in group.trajectories),
        trajectories=trajectories,
        advantages=np.concatenate(advantages),
        weights=_weights(all_lengths, counted, options)[here],
        staleness=tuple(trajectory_staleness(t, version_step, branches) for t in trajectories),
        statistics={
            **group_statistics(
                gather_arrays(world, rewards),
                gather_arrays(world, advantages),
                np.concatenate(world.gather(num_tokens)),
                all_lengths,
            ),
            "overlong_fraction": float(np.mean(np.concatenate(world.gather(overlong)))),
        },
        first=first,
        num_sequences=len(all_lengths),
    )


def _shape(group: TrajectoryGroup, rewards: NDArray[np.float64], options: TrainingOptions) -> ShapedGroup:
    """Advantages of a group, over-long members treated as the options say."""
    if options.overlong_limit is not None and options.overlong_cache is not None:
        num_tokens = np.array([int(t.loss_mask.sum()) for t in group.trajectories], dtype=np.int64)
        rewards = rewards + soft_penalty(num_tokens, options.overlong_limit, options.overlong_cache)
    return shape_group(
        group.trajectories,
        rewards,
        options.overlong,
        lambda r: group_advantages(r, divide_by_std=options.divide_by_std, baseline=options.baseline),
    )


def _weights(
    trained_lengths: NDArray[np.int64], counted: NDArray[np.bool_], options: TrainingOptions
) -> NDArray[np.float64]:
    """[N of all ranks] of each trajectory's summed token loss; 0 for those that do not count."""
    weights = np.zeros(counted.shape, dtype=np.float64)
    if counted.any():
        weights[counted] = sequence_weights(options.aggregation, trained_lengths[counted], options.horizon)
    return weights
