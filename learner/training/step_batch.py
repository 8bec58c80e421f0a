"""The data of one step: its trajectories with advantages, weights and staleness, cut into parts of one forward pass.

    groups ──> rewards ── shape (over-long rules) ──> advantages ─┐
       └─────> lengths ── aggregation ──> weights ────────────────┼──> StepBatch
       └─────> version spans ──> staleness ───────────────────────┘        │ pack: first those with a gradient
                                                                           ▼
    Part <── log-probs under earlier policies ── micro-batches, filled up to the number of the busiest rank

Weights depend on the whole step, so they are computed from the lengths of all ranks.

Shape legend: N trajectories of the step on this rank, all groups one after the other; T targets of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner.batch.advantages import ShapedGroup, group_advantages, is_overlong, shape_group, soft_penalty
from learner.batch.packing import MicroBatch, pack, plan_micro_batches
from learner.lineage import Branch, trajectory_staleness
from learner.losses.aggregation import sequence_weights
from learner.policy.model import PolicyModel
from learner.trainer import UnusableGroupError
from learner.training.policy_loss import OlderLogprobs
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


def group_statistics(
    rewards: Sequence[NDArray[np.float64]],
    advantages: Sequence[NDArray[np.float64]],
    num_tokens: NDArray[np.int64],
    num_trained_tokens: NDArray[np.int64],
) -> dict[str, float]:
    """Statistics of a step's groups.

    Args:
        rewards: G arrays, one entry per member.
        advantages: G arrays.
        num_tokens: [N] tokens per trajectory, prompt included.
        num_trained_tokens: [N] tokens in the loss per trajectory.
    """
    all_rewards = np.concatenate(rewards)
    all_advantages = np.concatenate(advantages)
    return {
        "reward_mean": float(all_rewards.mean()),
        "reward_std": float(all_rewards.std()),
        "advantage_mean_abs": float(np.abs(all_advantages).mean()),
        "advantage_max_abs": float(np.abs(all_advantages).max()),
        "no_signal_group_fraction": float(np.mean([not group.any() for group in advantages])),
        "response_length_mean": float(num_trained_tokens.mean()),
        "num_sequences": float(num_tokens.shape[0]),
        "num_tokens": float(num_tokens.sum()),
        "num_trained_tokens": float(num_trained_tokens.sum()),
    }


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


@dataclass(frozen=True, slots=True)
class Part:
    """A micro-batch, and what is known of it before its loss."""

    micro_batch: MicroBatch
    with_gradient: bool
    older: OlderLogprobs
    is_filler: bool = False  # computed for nothing, because another rank has one more

    def per_token(self, numbers: NDArray[np.float64], device: torch.device) -> Tensor:
        """[T] float32 of the targets from [N] of their trajectories."""
        return torch.from_numpy(numbers[self.micro_batch.target_sequences]).float().to(device)


@dataclass(frozen=True, slots=True)
class Partition:
    """How steps are cut into parts."""

    policy: PolicyModel
    options: TrainingOptions
    world: World
    with_routing: bool
    topk: int
    proximal: OlderPolicy | None
    reference: OlderPolicy | None

    def parts(
        self, batch: StepBatch, has_gradient: NDArray[np.bool_], chosen: NDArray[np.bool_] | None = None
    ) -> list[Part]:
        """Parts of the chosen trajectories [N], or of all, those with a gradient first."""
        everywhere = np.ones_like(has_gradient) if chosen is None else chosen
        packed = [
            (micro_batch, with_gradient, is_filler)
            for with_gradient in (True, False)
            for micro_batch, is_filler in self._as_many_as_others(
                batch, self._micro_batches(batch, everywhere & (has_gradient == with_gradient))
            )
        ]
        micro_batches = [micro_batch for micro_batch, _, _ in packed]
        proximal = self._logprobs_of(self.proximal, micro_batches)
        reference = self._logprobs_of(self.reference, micro_batches)
        return [
            Part(micro_batch, with_gradient, OlderLogprobs(old, first), is_filler)
            for (micro_batch, with_gradient, is_filler), old, first in zip(packed, proximal, reference, strict=True)
        ]

    def _micro_batches(self, batch: StepBatch, chosen: NDArray[np.bool_]) -> list[MicroBatch]:
        return batch.micro_batches(chosen, self.options, with_routing=self.with_routing, topk=self.topk)

    def _as_many_as_others(
        self, batch: StepBatch, micro_batches: Sequence[MicroBatch]
    ) -> Iterator[tuple[MicroBatch, bool]]:
        """The micro-batches, and fillers up to the number that the busiest rank has: sharded layers meet in each."""
        for micro_batch in micro_batches:
            yield micro_batch, False
        most = int(self.world.reduce(torch.tensor(len(micro_batches)), "max"))
        for _ in range(most - len(micro_batches)):
            yield self._micro_batches(batch, batch.shortest())[0], True

    @torch.no_grad()
    def _logprobs_of(self, older: OlderPolicy | None, micro_batches: Sequence[MicroBatch]) -> Sequence[Tensor | None]:
        """[T] of each micro-batch, under earlier weights."""
        if older is None:
            return [None] * len(micro_batches)
        logprobs: list[Tensor | None] = []
        with older.in_place():
            for micro_batch in micro_batches:
                with self.policy.scored(micro_batch) as scores:
                    logprobs.append(scores.logprobs)
        return logprobs


class OlderPolicy:
    """A copy of a policy's weights."""

    def __init__(self, live: Mapping[str, Tensor]) -> None:
        """Copy `live`, whose tensors must stay the ones that the model computes with."""
        self._live = live
        self.weights = {name: tensor.detach().clone() for name, tensor in live.items()}

    @torch.no_grad()
    def refresh(self) -> None:
        """Become what the policy is now."""
        for name, tensor in self._live.items():
            self.weights[name].copy_(tensor)

    @contextmanager
    def in_place(self) -> Generator[None]:
        """The policy has this copy's weights inside, and its own, bit for bit, afterwards."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, tensor in self._live.items():
            kept = tensor.clone()
            tensor.copy_(self.weights[name])
            self.weights[name].copy_(kept)
