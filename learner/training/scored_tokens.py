"""What is kept of the scored micro-batches of a step, and what a step reports of them.

Shape legend: T tokens of a micro-batch or, joined, of all micro-batches and ranks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from learner.batch.step_batch import StepBatch
from learner.losses.form import TokenTerms, TokenValues
from learner.training.statistics import candidate_statistics, token_statistics
from learner.training.world import World, gather_arrays, gather_tensor
from leeway.types import Float32Array


@dataclass(frozen=True, slots=True)
class ScoredTokens:
    """Of one micro-batch, without gradient."""

    loss: Tensor  # scalar, this micro-batch's share of the step's loss
    sequences: Tensor  # [T] index of the trajectory
    values: TokenValues
    terms: TokenTerms
    entropies: Tensor
    culprit: int | None  # index of a trajectory whose loss is not finite
    load_balancing: float = 0.0  # this micro-batch's share of the step's mean


def scored_statistics(scored: Sequence[ScoredTokens], world: World) -> dict[str, float]:
    """Statistics over the tokens of all micro-batches and ranks."""

    def joined(of: Callable[[ScoredTokens], Tensor]) -> Tensor:
        return gather_tensor(world, torch.cat([of(part) for part in scored]))

    values = TokenValues(
        policy_logprobs=joined(lambda part: part.values.policy_logprobs),
        behavior_logprobs=joined(lambda part: part.values.behavior_logprobs),
        ratio=joined(lambda part: part.values.ratio),
        advantages=joined(lambda part: part.values.advantages),
    )
    terms = TokenTerms(kept=joined(lambda part: part.terms.kept), weight=joined(lambda part: part.terms.weight))
    return {
        **token_statistics(values, terms, joined(lambda part: part.entropies)),
        **candidate_statistics([part.values.candidates for part in scored], world.reduce),
    }


def policy_logprobs(batch: StepBatch, scored: Sequence[ScoredTokens], world: World) -> dict[str, Float32Array]:
    """[tokens in the loss] of every trajectory of all ranks, by its id.

    A trajectory's tokens are scored together and in order.
    """
    sequences = torch.cat([part.sequences for part in scored]).cpu().numpy()
    logprobs = torch.cat([part.values.policy_logprobs for part in scored]).cpu().numpy()
    order = np.argsort(sequences, kind="stable")
    ends = np.searchsorted(sequences[order], np.arange(1, len(batch.trajectories)))
    parts = np.split(logprobs[order], ends)
    return _gathered(
        {trajectory.trajectory_id: part for trajectory, part in zip(batch.trajectories, parts, strict=True)}, world
    )


def _gathered(logprobs: Mapping[str, Float32Array], world: World) -> dict[str, Float32Array]:
    names = [name for text in world.gather_text(json.dumps(list(logprobs))) for name in json.loads(text)]
    return dict(zip(names, gather_arrays(world, list(logprobs.values())), strict=True))
