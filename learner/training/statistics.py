"""Statistics of one step, from its scored tokens.

Shape legend: T trained tokens of a micro-batch or, joined, of all micro-batches and ranks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from learner.losses.batch_statistics import Reduce
from learner.losses.form import Candidates, TokenTerms, TokenValues
from learner.training.step_batch import StepBatch
from learner.training.world import World, gather_arrays, gather_tensor
from leeway.types import Float32Array


@torch.no_grad()
def token_statistics(values: TokenValues, terms: TokenTerms, entropies: Tensor) -> dict[str, float]:
    """Statistics over all trained tokens, before the step.

    Masked fractions are shares of the tokens whose advantage is not zero; `..._positive` and `..._negative` add up to
    the whole. k1 and k3 estimate KL(mu || pi): mean(-log r) and mean(r - 1 - log r).

    Args:
        values: [T] each.
        terms: [T] each.
        entropies: [T] of the policy's distribution.

    Returns:
        Numbers by name; those of masked tokens only where there is one.

    Example:
        mu = [.5, .5], pi = [.75, .2]: mean_abs_policy_behavior_difference = .275, its maximum .3, signed .25 and -.3.
    """
    if values.ratio.numel() == 0:
        return {}
    difference = values.policy_logprobs.exp() - values.behavior_logprobs.exp()
    log_ratio = values.policy_logprobs - values.behavior_logprobs
    has_signal = values.advantages != 0
    masked = ~terms.kept & has_signal
    num_signal = has_signal.sum().clamp(min=1)
    named = {
        "mean_abs_policy_behavior_difference": difference.abs().mean(),
        "max_abs_policy_behavior_difference": difference.abs().max(),
        "max_policy_behavior_difference": difference.max(),
        "min_policy_behavior_difference": difference.min(),
        "ratio_mean": values.ratio.mean(),
        "ratio_max": values.ratio.max(),
        "masked_fraction": masked.sum() / num_signal,
        "masked_fraction_positive": (masked & (values.advantages > 0)).sum() / num_signal,
        "masked_fraction_negative": (masked & (values.advantages < 0)).sum() / num_signal,
        "entropy": entropies.mean(),
        "k1": -log_ratio.mean(),
        "k3": (values.ratio - 1 - log_ratio).mean(),
    }
    if masked.any():
        named |= {
            "masked_behavior_probability_mean": values.behavior_logprobs[masked].exp().mean(),
            "masked_policy_probability_mean": values.policy_logprobs[masked].exp().mean(),
            "masked_ratio_mean": values.ratio[masked].mean(),
            "masked_entropy_mean": entropies[masked].mean(),
        }
    numbers = cast("list[float]", torch.stack([value.double() for value in named.values()]).tolist())
    return dict(zip(named, numbers, strict=True))


@torch.no_grad()
def candidate_statistics(parts: Sequence[Candidates | None], reduce: Reduce) -> dict[str, float]:
    """How much of both distributions the recorded candidates hold, a mean over all ranks; empty without candidates.

    Example:
        K = 2, mu = [.5, .25], pi = [.4, .25]: topk_behavior_mass = .75, topk_policy_mass = .65.
    """
    totals = torch.zeros(3, dtype=torch.float64)
    for part in parts:
        if part is None:
            return {}
        masses = [x.double().exp().sum().cpu() for x in (part.behavior_logprobs, part.policy_logprobs)]
        totals += torch.stack([*masses, torch.tensor(float(part.valid.shape[0]), dtype=torch.float64)])
    behavior, policy, num_tokens = cast("list[float]", reduce(totals, "sum").tolist())
    if not num_tokens:
        return {}
    return {"topk_behavior_mass": behavior / num_tokens, "topk_policy_mass": policy / num_tokens}


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
