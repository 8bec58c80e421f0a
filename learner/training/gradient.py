"""The gradient of one step: micro-batches scored, their losses differentiated and added up.

    StepBatch ── plan, pack ──> micro-batch ── score ──> token losses ── backward ──┐ accumulated
                     │                                      ▲                       ▼
    older policies' log-probs, step statistics ─────────────┘                   gradient ── finite? ──> the optimizer

Losses are weighted by the whole step's counts, so micro-batches add up to the batch. Trajectories whose advantage is
zero have a gradient of zero, unless the loss has penalties or routers are balanced: they are scored for the statistics
and skip the backward pass. Where a loss or the gradient is not finite, the trajectory that makes it so is named.

Shape legend: N trajectories of a step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner.losses.batch_statistics import BatchStatistics
from learner.losses.form import TokenBatch, TokenTerms, token_losses, token_values
from learner.policy import local_part
from learner.policy.head import TokenScores
from learner.trainer import UnusableGroupError
from learner.training.optimizer import Optimizer
from learner.training.policy_loss import PolicyLoss
from learner.training.statistics import ScoredTokens
from learner.training.step_batch import Part, Partition, StepBatch
from leeway.errors import PreconditionError


class StepGradient:
    """Leaves the gradient of a step in the policy's parameters.

    Args:
        partition: plans micro-batches and packs them, for its policy and its world of ranks.
        loss: of tokens.
        optimizer: owns the gradients.
    """

    def __init__(self, partition: Partition, loss: PolicyLoss, optimizer: Optimizer) -> None:
        self._partition = partition
        self._policy = partition.policy
        self._options = partition.options
        self._world = partition.world
        self._loss = loss
        self._optimizer = optimizer

    def accumulate(self, batch: StepBatch) -> tuple[list[ScoredTokens], Tensor]:
        """Score the batch and add up its gradient.

        Returns:
            What was scored, by micro-batch, and the gradient's norm, which is finite.

        Raises:
            UnusableGroupError: a loss or the gradient is not finite; the gradient is zero again.
        """
        parts = self._partition.parts(batch, self._has_gradient(batch))
        statistics = self._measured(batch, parts)
        self._optimizer.zero_gradients()
        scored = [part for part in (self._add(batch, part, statistics) for part in parts) if part is not None]
        self._require_finite(batch, scored)
        norm = self._optimizer.gradient_norm()
        if not torch.isfinite(norm):
            raise self._explain_gradient(batch, statistics)
        return scored, norm

    def _has_gradient(self, batch: StepBatch) -> NDArray[np.bool_]:
        """[N] whether a trajectory can have one: penalties and balancing act on tokens without advantage too."""
        everywhere = self._loss.penalties.active or self._options.load_balancing > 0
        return batch.advantages.astype(bool) | everywhere

    @torch.no_grad()
    def _measured(self, batch: StepBatch, parts: Sequence[Part]) -> BatchStatistics | None:
        """The pass without gradient that a batch-aware loss needs first."""
        if not self._loss.batch_aware:
            return None
        device = self._policy.device

        def scored() -> Generator[TokenBatch]:
            for part in parts:
                with self._policy.scored(part.micro_batch) as scores:
                    if not part.is_filler:
                        advantages = part.per_token(batch.advantages, device)
                        yield self._loss.token_batch(
                            part.micro_batch, scores, advantages, part.older, first_sequence=batch.first
                        )

        return self._loss.measured(scored(), batch.num_sequences)

    def _add(self, batch: StepBatch, part: Part, statistics: BatchStatistics | None) -> ScoredTokens | None:
        """Score one micro-batch and add its gradient; a filler adds nothing."""
        device = self._policy.device
        sequences = torch.from_numpy(part.micro_batch.target_sequences).to(device)
        advantages = part.per_token(batch.advantages, device)
        weights = part.per_token(batch.weights, device)

        def tokens_at(places: slice, scores: TokenScores) -> TokenBatch:
            return self._loss.token_batch(
                part.micro_batch,
                scores,
                advantages,
                part.older,
                statistics,
                places=places,
                first_sequence=batch.first,
            )

        def summed_loss(places: slice, scores: TokenScores) -> Tensor:
            if part.is_filler:
                return (scores.logprobs * 0.0).sum()
            losses, _ = self._losses(tokens_at(places, scores))
            return (losses * weights[places]).sum()

        with (
            torch.set_grad_enabled(part.with_gradient),
            self._policy.scored(part.micro_batch, summed_loss if part.with_gradient else None) as scores,
        ):
            further, load_balancing = None, 0.0
            if scores.load_balancing is not None and not part.is_filler:
                mean = scores.load_balancing.sum() / batch.num_sequences
                further, load_balancing = self._options.load_balancing * mean, float(mean.detach())
            if part.with_gradient:
                scores.backward(further)
        if part.is_filler:
            return None
        tokens = tokens_at(slice(None), scores.detached())
        losses, terms = self._losses(tokens)
        unusable = ~torch.isfinite(losses)
        loss = (losses * weights).sum()
        return ScoredTokens(
            loss if further is None else loss + further.detach(),
            sequences,
            token_values(tokens),
            terms,
            scores.entropies,
            int(sequences[unusable][0]) if unusable.any() else None,
            load_balancing,
        )

    def _losses(self, tokens: TokenBatch) -> tuple[Tensor, TokenTerms]:
        """[T] losses before aggregation, and the terms behind them."""
        return token_losses(tokens, self._loss.decide, self._loss.parameters, self._loss.penalties)

    def _require_finite(self, batch: StepBatch, scored: Sequence[ScoredTokens]) -> None:
        """Raises UnusableGroupError, the same on every rank, when a trajectory's loss is not finite."""
        culprit = next((part.culprit for part in scored if part.culprit is not None), None)
        if culprit is not None:
            self._require_finite_weights()
        blame = None if culprit is None else batch.blame(culprit, "has a loss that is not finite; nothing was changed")
        if (error := self._agreed(blame)) is not None:
            self._optimizer.zero_gradients()
            raise error

    def _agreed(self, error: UnusableGroupError | None) -> UnusableGroupError | None:
        """The first rank's error that has one, on every rank."""
        mine = "" if error is None else json.dumps([error.group_id, error.message])
        texts = [text for text in self._world.gather_text(mine) if text]
        return UnusableGroupError(*json.loads(texts[0])) if texts else None

    def _explain_gradient(self, batch: StepBatch, statistics: BatchStatistics | None) -> UnusableGroupError:
        """Find who makes the gradient not finite: each trajectory alone, the worst is named."""
        self._require_finite_weights()
        worst, worst_norm = 0, -1.0
        has_gradient = self._has_gradient(batch)
        for index in np.flatnonzero(np.concatenate(self._world.gather(has_gradient))).tolist():
            self._optimizer.zero_gradients()
            alone = np.arange(len(batch.trajectories)) == index - batch.first
            for part in self._partition.parts(batch, has_gradient, alone):
                self._add(batch, part, statistics)
            norm = float(self._optimizer.gradient_norm())
            norm = norm if math.isfinite(norm) else math.inf
            if norm > worst_norm:
                worst, worst_norm = index, norm
        self._optimizer.zero_gradients()
        mine = 0 <= worst - batch.first < len(batch.trajectories)
        message = "makes the gradient not finite; nothing was changed"
        error = self._agreed(batch.blame(worst - batch.first, message) if mine else None)
        assert error is not None
        return error

    def _require_finite_weights(self) -> None:
        for name, tensor in self._policy.weights().items():
            if not torch.isfinite(local_part(tensor)).all():
                raise PreconditionError(f"the learner's weight {name} is not finite; resume from a checkpoint")
