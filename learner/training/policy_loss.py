"""The configured loss of a trainer: its input from a micro-batch, its measurement of the step, its running mismatch.

    micro-batches ── score without gradient ──> measured ──> statistics of the step      (batch-aware losses only)
    micro-batch ── score ──> token_batch ──> (the gradient) ──> observed ──> running mismatch, for later steps

The mismatch is the mean divergence of tokens of staleness zero: what engine and learner disagree about although their
weights are the same.

Shape legend: T trained tokens of a micro-batch, N sequences of the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from learner.batch.packing import MicroBatch
from learner.losses.batch_statistics import (
    BatchStatistics,
    Reduce,
    merge_statistics,
    reduce_statistics,
    single_process,
)
from learner.losses.form import (
    Candidates,
    TokenBatch,
    TokenTerms,
    TokenValues,
    load_algorithm,
    load_measure,
    token_values,
)
from learner.policy.head import TokenScores
from leeway.config import TrainingOptions
from leeway.config.algorithms import LossParameters


@dataclass(frozen=True, slots=True)
class OlderLogprobs:
    """Log-probs of targets under earlier policies; None where the loss needs none, or takes the learner's own."""

    proximal: Tensor | None = None  # [T]
    reference: Tensor | None = None  # [T]


class PolicyLoss:
    """One algorithm with its numbers, and the mismatch measured so far."""

    def __init__(self, options: TrainingOptions, reduce: Reduce = single_process) -> None:
        """Load the algorithm; `reduce` combines what ranks measure."""
        algorithm = options.loss_algorithm
        self.topk = options.topk_needed
        self.penalties = options.penalties
        self.needs_proximal = algorithm.needs_proximal
        self.mismatch = RunningMismatch()
        self.decide = load_algorithm(algorithm)
        self._measure = load_measure(algorithm)
        self._numbers = options.loss_parameters
        self._memory_steps = options.mismatch_memory_steps
        self._reduce = reduce

    @property
    def batch_aware(self) -> bool:
        """True where the step has to be measured before its losses are known."""
        return self._measure is not None

    def token_batch(
        self,
        micro_batch: MicroBatch,
        scores: TokenScores,
        advantages: Tensor,
        older: OlderLogprobs,
        statistics: BatchStatistics | None = None,
        *,
        places: slice = slice(None),
        first_sequence: int = 0,
    ) -> TokenBatch:
        """Put together what the loss sees of the micro-batch's targets at `places`.

        Args:
            micro_batch: T targets.
            scores: of the targets at `places` alone.
            advantages: [T].
            older: [T] each.
            statistics: of the whole step, for a batch-aware loss.
            places: which targets.
            first_sequence: the place of this rank's first trajectory among those of all ranks.
        """
        device, staleness = scores.logprobs.device, micro_batch.staleness
        sequences = torch.from_numpy(micro_batch.target_sequences[places]).to(device) + first_sequence
        proximal = None if older.proximal is None else older.proximal[places]
        if proximal is None and self.needs_proximal:
            proximal = scores.logprobs.detach()
        return TokenBatch(
            policy_logprobs=scores.logprobs,
            behavior_logprobs=torch.from_numpy(micro_batch.behavior_logprobs[places]).to(device),
            advantages=advantages[places],
            loss_mask=torch.ones_like(sequences, dtype=torch.bool),
            sequence_ids=sequences,
            candidates=_candidates(micro_batch, scores, places),
            staleness=None if staleness is None else torch.from_numpy(staleness[places]).to(device),
            proximal_logprobs=proximal,
            reference_logprobs=None if older.reference is None else older.reference[places],
            entropies=scores.entropies,
            statistics=statistics,
        )

    def measured(self, parts: Iterable[TokenBatch], num_sequences: int) -> BatchStatistics | None:
        """Statistics of the whole step from all of its micro-batches; None for a token-local loss."""
        if self._measure is None:
            return None
        measured = [self._measure(token_values(part), self.parameters, num_sequences) for part in parts]
        return reduce_statistics(merge_statistics(measured), self._reduce)

    def observed(self, totals: Mapping[str, float]) -> Mapping[str, float]:
        """Update the mismatch from the `fresh_totals` of all ranks; returns it as a statistic.

        A loss around pi_old has no divergence from the engine to learn it from.
        """
        if self.needs_proximal:
            return {}
        self.mismatch = self.mismatch.after(totals["fresh_divergence"], totals["fresh_tokens"], self._memory_steps)
        return {"mismatch": self.mismatch.mean} if self.mismatch.tokens else {}

    @property
    def parameters(self) -> LossParameters:
        """The algorithm's numbers, with the mismatch measured so far."""
        return replace(self._numbers, mismatch=self.mismatch.mean)


def fresh_totals(parts: Iterable[tuple[TokenValues, TokenTerms]]) -> dict[str, float]:
    """The summed divergence of tokens of staleness zero, and how many there are."""
    total = tokens = 0.0
    for values, terms in parts:
        if terms.divergence is not None and values.staleness is not None:
            fresh = terms.divergence[values.staleness == 0].double()
            fresh = fresh[torch.isfinite(fresh)]
            total, tokens = total + float(fresh.sum()), tokens + fresh.numel()
    return {"fresh_divergence": total, "fresh_tokens": tokens}


def _candidates(micro_batch: MicroBatch, scores: TokenScores, places: slice) -> Candidates | None:
    if micro_batch.topk_token_ids is None or micro_batch.topk_behavior_logprobs is None or scores.topk_logprobs is None:
        return None
    sampled = micro_batch.topk_token_ids[places] == micro_batch.target_token_ids[places, None]
    device = scores.topk_logprobs.device
    return Candidates(
        torch.from_numpy(micro_batch.topk_behavior_logprobs[places]).to(device),
        scores.topk_logprobs,
        torch.from_numpy(~sampled).to(device),
    )


@dataclass(frozen=True, slots=True)
class RunningMismatch:
    """A mean over tokens in which a step counts 1 - 1 / memory as much as the one after it.

    Steps without tokens of staleness zero change nothing, so a run that is always stale keeps what it last knew.
    """

    total: float = 0.0
    tokens: float = 0.0

    @property
    def mean(self) -> float:
        """0 until something was measured."""
        return self.total / self.tokens if self.tokens else 0.0

    def after(self, total: float, tokens: float, memory_steps: int) -> RunningMismatch:
        """With one more step's sum of divergences and number of tokens.

        Example:
            memory 2: 10 tokens of .1, then 10 of .4: (.5 + 4) / (5 + 10) = .3.
        """
        if not tokens:
            return self
        decay = 1 - 1 / memory_steps
        return RunningMismatch(decay * self.total + total, decay * self.tokens + tokens)
