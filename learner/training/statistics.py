"""Statistics of one step and the policy's log-probs, from the scored tokens of all ranks.

    ScoredTokens of this rank's micro-batches ──┬── gather ──> tokens of the step ──> statistics, policy log-probs
                                                └── sum ──> totals of the step ──> loss, mismatch, candidates, balancing

Shape legend: T trained tokens of the step, in the order of ranks and micro-batches.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner.losses.form import Candidates, TokenTerms, TokenValues
from learner.training.step_batch import StepBatch
from learner.training.world import World
from leeway.types import Float32Array

TOKEN: Final = np.dtype(
    [
        ("sequence", np.int64),  # index of the trajectory in the step
        ("policy_logprob", np.float32),
        ("behavior_logprob", np.float32),
        ("ratio", np.float32),
        ("advantage", np.float32),
        ("entropy", np.float32),  # of the policy's distribution
        ("kept", np.bool_),  # by the loss's mask
    ]
)


@dataclass(frozen=True, slots=True)
class ScoredTokens:
    """The trained tokens of one micro-batch, without gradient."""

    loss: Tensor  # scalar, this micro-batch's share of the step's loss
    sequences: Tensor  # index of each token's trajectory among this rank's
    values: TokenValues
    terms: TokenTerms
    entropies: Tensor
    culprit: int | None  # index of a trajectory whose loss is not finite
    load_balancing: float = 0.0  # this micro-batch's share of the step's mean


def gather_tokens(scored: Sequence[ScoredTokens], first: int, world: World) -> NDArray[Any]:
    """[T] records of TOKEN.

    Args:
        scored: the micro-batches of this rank.
        first: this rank's first trajectory among those of all ranks.
        world: the ranks that share the step.
    """
    tokens = np.empty(sum(part.sequences.numel() for part in scored), TOKEN)
    columns = {
        "sequence": [part.sequences + first for part in scored],
        "policy_logprob": [part.values.policy_logprobs for part in scored],
        "behavior_logprob": [part.values.behavior_logprobs for part in scored],
        "ratio": [part.values.ratio for part in scored],
        "advantage": [part.values.advantages for part in scored],
        "entropy": [part.entropies for part in scored],
        "kept": [part.terms.kept for part in scored],
    }
    for name, column in columns.items():
        tokens[name] = torch.cat(column).detach().cpu().numpy()
    return np.concatenate(world.gather(tokens))


@torch.no_grad()
def token_statistics(tokens: NDArray[Any]) -> dict[str, float]:
    """Statistics over all trained tokens, before the step.

    Masked fractions are shares of the tokens whose advantage is not zero; `..._positive` and `..._negative` add up to
    the whole. k1 and k3 estimate KL(mu || pi): mean(-log r) and mean(r - 1 - log r).

    Args:
        tokens: [T] records of TOKEN.

    Returns:
        Numbers by name; those of masked tokens only where there is one.

    Example:
        mu = [.5, .5], pi = [.75, .2]: mean_abs_policy_behavior_difference = .275, its maximum .3, signed .25 and -.3.
    """
    if not tokens.size:
        return {}

    def column(name: str) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(tokens[name]))

    policy, behavior, ratio = column("policy_logprob"), column("behavior_logprob"), column("ratio")
    advantages, entropies = column("advantage"), column("entropy")
    difference = policy.exp() - behavior.exp()
    log_ratio = policy - behavior
    has_signal = advantages != 0
    masked = ~column("kept") & has_signal
    num_signal = has_signal.sum().clamp(min=1)
    named = {
        "mean_abs_policy_behavior_difference": difference.abs().mean(),
        "max_abs_policy_behavior_difference": difference.abs().max(),
        "max_policy_behavior_difference": difference.max(),
        "min_policy_behavior_difference": difference.min(),
        "ratio_mean": ratio.mean(),
        "ratio_max": ratio.max(),
        "masked_fraction": masked.sum() / num_signal,
        "masked_fraction_positive": (masked & (advantages > 0)).sum() / num_signal,
        "masked_fraction_negative": (masked & (advantages < 0)).sum() / num_signal,
        "entropy": entropies.mean(),
        "k1": -log_ratio.mean(),
        "k3": (ratio - 1 - log_ratio).mean(),
    }
    if masked.any():
        named |= {
            "masked_behavior_probability_mean": behavior[masked].exp().mean(),
            "masked_policy_probability_mean": policy[masked].exp().mean(),
            "masked_ratio_mean": ratio[masked].mean(),
            "masked_entropy_mean": entropies[masked].mean(),
        }
    numbers = cast("list[float]", torch.stack([value.double() for value in named.values()]).tolist())
    return dict(zip(named, numbers, strict=True))


def policy_logprobs(tokens: NDArray[Any], batch: StepBatch, world: World) -> dict[str, Float32Array]:
    """[tokens in the loss] of every trajectory of all ranks, by its id.

    A trajectory's tokens are scored together and in order.
    """
    names = [trajectory.trajectory_id for trajectory in batch.trajectories]
    names = [name for text in world.gather_text(json.dumps(names)) for name in json.loads(text)]
    tokens = tokens[np.argsort(tokens["sequence"], kind="stable")]
    ends = np.searchsorted(tokens["sequence"], np.arange(1, len(names)))
    parts = np.split(np.ascontiguousarray(tokens["policy_logprob"]), ends)
    return dict(zip(names, parts, strict=True))


def candidate_totals(parts: Sequence[Candidates | None]) -> dict[str, float]:
    """The probability that both distributions give the recorded candidates, summed; empty without candidates."""
    totals = np.zeros(3)
    for part in parts:
        if part is None:
            return {}
        masses = [float(x.double().exp().sum()) for x in (part.behavior_logprobs, part.policy_logprobs)]
        totals += [*masses, part.valid.shape[0]]
    return dict(zip(("behavior_mass", "policy_mass", "candidate_tokens"), totals.tolist(), strict=True))


def candidate_statistics(totals: Mapping[str, float]) -> dict[str, float]:
    """The mean probability of the recorded candidates in both distributions; empty without candidates.

    Example:
        K = 2, mu = [.5, .25], pi = [.4, .25]: topk_behavior_mass = .75, topk_policy_mass = .65.
    """
    num_tokens = totals.get("candidate_tokens")
    if not num_tokens:
        return {}
    return {f"topk_{name}": totals[name] / num_tokens for name in ("behavior_mass", "policy_mass")}
