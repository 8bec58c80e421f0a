"""The arithmetic law asked about one token, and the version names of its weights: what tests expect of engines."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from leeway.arithmetic import ArithmeticWeights, next_distribution, published_weights, sample
from leeway.types import PolicyVersion
from leeway.weights.digests import weights_digest


def policy_version(run: str, epoch: int, step: int, history: int = 0) -> PolicyVersion:
    """The identity of the weights of (history, step), made by the learner's incarnation `epoch`."""
    return PolicyVersion(run, epoch, step, weights_digest(published_weights(history, step)[0]))


def next_token(
    weights: ArithmeticWeights, prefix: Sequence[int] | NDArray[np.int32], seed: int, temperature: float = 1.0
) -> tuple[int, float]:
    """Sample the token after `prefix`: (token id, log-probability)."""
    length = len(prefix)
    return sample(next_distribution(weights, length, int(prefix[-1]), temperature), length, seed)


def behavior_logprob(
    weights: ArithmeticWeights, prefix: Sequence[int] | NDArray[np.int32], token_id: int, temperature: float = 1.0
) -> float:
    """The log-probability of `token_id` after `prefix` under the weights that its label names."""
    return next_distribution(weights, len(prefix), int(prefix[-1]), temperature).logprob(token_id)
