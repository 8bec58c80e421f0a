"""The micro-batches of a step, in the order in which they are trained.

    StepBatch ── pack: those with a gradient, then the others ──> micro-batches ── fill up to the busiest rank ──┐
    parts <── log-probs of their targets under earlier policies ────────────────────────────────────────────────┘

Shape legend: N trajectories of the step on this rank, T targets of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner.batch.packing import MicroBatch
from learner.batch.step_batch import StepBatch
from learner.policy.model import PolicyModel
from learner.training.older_policies import OlderPolicy
from learner.training.policy_loss import OlderLogprobs
from learner.training.world import World
from leeway.config import TrainingOptions


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
