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
from typing import Any, Final, cast

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
from learner.training.world import World
from leeway.config import TrainingOptions
from leeway.types import Trajectory, TrajectoryGroup

_SEQUENCE: Final = np.dtype(
    [
        ("starts_group", np.bool_),
        ("reward", np.float64),
        ("advantage", np.float64),
        ("counted", np.bool_),  # in the normalisation of the step's loss
        ("num_tokens", np.int64),  # prompt included
        ("trained_tokens", np.int64),
        ("overlong", np.bool_),
    ]
)
"""One trajectory, as ranks exchange it."""


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One rank's trajectories of a step."""

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
    trajectories = tuple(trajectory for group in groups for trajectory in group.trajectories)
    mine = np.empty(len(trajectories), _SEQUENCE)
    mine["starts_group"] = [place == 0 for group in groups for place in range(len(group.trajectories))]
    mine["reward"] = np.concatenate(rewards)
    mine["advantage"] = np.concatenate([group.advantages for group in shaped])
    mine["counted"] = np.concatenate([group.counted for group in shaped])
    mine["num_tokens"] = [t.num_tokens for t in trajectories]
    mine["trained_tokens"] = [int(t.loss_mask.sum()) for t in trajectories]
    mine["overlong"] = [is_overlong(t) for t in trajectories]
    ranks = world.gather(mine)
    everyone = np.concatenate(ranks)
    first = sum(len(sequences) for sequences in ranks[: world.rank])
    return StepBatch(
        group_ids=tuple(group.group_id for group in groups for _ in group.trajectories),
        trajectories=trajectories,
        advantages=mine["advantage"],
        weights=_weights(everyone, options)[first : first + len(trajectories)],
        staleness=tuple(trajectory_staleness(t, version_step, branches) for t in trajectories),
        statistics=_statistics(everyone),
        first=first,
        num_sequences=len(everyone),
    )


def _statistics(sequences: NDArray[Any]) -> dict[str, float]:
    """Statistics of a step's groups, from records of _SEQUENCE."""
    rewards, advantages = sequences["reward"], sequences["advantage"]
    group_has_signal = np.logical_or.reduceat(advantages != 0, np.flatnonzero(sequences["starts_group"]))
    return {
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "advantage_mean_abs": float(np.abs(advantages).mean()),
        "advantage_max_abs": float(np.abs(advantages).max()),
        "no_signal_group_fraction": float(np.mean(~group_has_signal)),
        "response_length_mean": float(sequences["trained_tokens"].mean()),
        "num_sequences": float(len(sequences)),
        "num_tokens": float(sequences["num_tokens"].sum()),
        "num_trained_tokens": float(sequences["trained_tokens"].sum()),
        "overlong_fraction": float(np.mean(sequences["overlong"])),
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


def _weights(sequences: NDArray[Any], options: TrainingOptions) -> NDArray[np.float64]:
    """Weight of each sequence's summed token loss; 0 for those that do not count."""
    counted = sequences["counted"]
    weights = np.zeros(len(sequences), dtype=np.float64)
    if counted.any():
        weights[counted] = sequence_weights(options.aggregation, sequences["trained_tokens"][counted], options.horizon)
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
    """Cuts steps into parts."""

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
        by_gradient = {
            with_gradient: self._micro_batches(batch, everywhere & (has_gradient == with_gradient))
            for with_gradient in (True, False)
        }
        counts = torch.tensor([len(own) for own in by_gradient.values()])
        most = cast("list[int]", self.world.reduce(counts, "max").tolist())
        packed = [
            (micro_batch, with_gradient, is_filler)
            for (with_gradient, own), count in zip(by_gradient.items(), most, strict=True)
            for micro_batch, is_filler in self._filled(batch, own, count)
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

    def _filled(
        self, batch: StepBatch, micro_batches: Sequence[MicroBatch], count: int
    ) -> Iterator[tuple[MicroBatch, bool]]:
        """The micro-batches, and fillers up to what the busiest rank has: sharded layers of all ranks meet in each."""
        for micro_batch in micro_batches:
            yield micro_batch, False
        for _ in range(count - len(micro_batches)):
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
    """Earlier weights of the policy, which some losses compare with: the initial model, or the learner some steps ago.

    The copy changes places with the live weights while it is used, tensor by tensor, so that it runs through the same
    modules (hooks, packing, routing replay) and needs no second model.
    """

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
