"""Sampling a token and the log-probability it was sampled with.

For logits z [V] and temperature T, log mu = log_softmax(z / T) in float32; the token is the inverse of the cumulative
sum of mu in float64 at a uniform number that depends on the trajectory's seed and the token's position alone. So a
sample does not depend on what else is in the batch, beyond float noise in z.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from leeway.service.seeds import GAMMA, mix64
from leeway.types import Float32Array, Int32Array


@dataclass(frozen=True, slots=True)
class Sampled:
    """One token for each of n rows."""

    token_ids: Int32Array  # [n]
    logprobs: Float32Array  # [n]
    topk_token_ids: Int32Array | None  # [n, K], likeliest first
    topk_logprobs: Float32Array | None  # [n, K]


def uniforms(seeds: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) with 53 bits, one for each (seed, position); both [n]."""
    bits = mix64(mix64(seeds) + (positions + np.uint64(1)) * np.uint64(GAMMA)) >> np.uint64(11)
    return bits.astype(np.float64) * np.float64(2.0**-53)


def sample(logits: torch.Tensor, temperatures: torch.Tensor, draws: NDArray[np.float64], topk: int) -> Sampled:
    """Sample one token per row.

    Args:
        logits: [n, V], any float type.
        temperatures: [n] float32, greater than 0.
        draws: [n], from `uniforms`.
        topk: K of the recorded candidates; 0 for none.

    Raises:
        FloatingPointError: the logits of a row are not finite numbers.
    """
    logprobs = torch.log_softmax(logits.float() / temperatures[:, None], dim=-1)  # [n, V]
    cumulative = logprobs.double().exp_().cumsum_(dim=-1)
    targets = torch.from_numpy(draws)[:, None] * cumulative[:, -1:]
    # right=True: the first token whose cumulative sum exceeds the target, hence never one of probability 0.
    token_ids = torch.searchsorted(cumulative, targets, right=True).clamp_(max=logits.shape[-1] - 1)  # [n, 1]
    chosen = logprobs.gather(1, token_ids)[:, 0].numpy()
    if not np.isfinite(chosen).all():
        raise FloatingPointError("the model's logits are not finite numbers")
    top_logprobs, top_ids = logprobs.topk(topk) if topk else (None, None)
    return Sampled(
        token_ids=token_ids[:, 0].numpy().astype(np.int32),
        logprobs=chosen,
        topk_token_ids=None if top_ids is None else top_ids.numpy().astype(np.int32),
        topk_logprobs=None if top_logprobs is None else top_logprobs.numpy(),
    )
