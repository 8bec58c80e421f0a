"""How little routing could take: entropies of the ids [n, L, k] of each layer, in bits per id.

    order0   H(id | layer): every id by itself. The entropy of the counted shares.
    tuples   H(ordered k-tuple | layer) / k: slots in their order, no expert twice. Where every tuple is met often, the
             entropy of their counted shares. Otherwise that of the likeliest Plackett-Luce law, which draws one expert
             after the other without replacement by weights w: P(a, b, ...) = w_a / (1) * w_b / (1 - w_a) * ...

Both take tokens for independent of each other: what one says about the next is not counted.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from leeway.types import Array

_SAMPLES_PER_TUPLE = 10
_ITERATIONS = 40


def order0(ids: Array) -> float:
    """H(id | layer), mean over layers."""
    return float(np.mean([_entropy(np.unique(plane, return_counts=True)[1]) for plane in ids.transpose(1, 0, 2)]))


def tuples(ids: Array, experts: int) -> float:
    """H(k-tuple | layer) / k, mean over layers."""
    n, _, k = ids.shape
    if n >= _SAMPLES_PER_TUPLE * experts**k:
        counts = [np.unique(plane, axis=0, return_counts=True)[1] for plane in ids.transpose(1, 0, 2)]
        return float(np.mean([_entropy(count) for count in counts])) / k
    return float(np.mean([_plackett_luce(plane, experts) for plane in ids.transpose(1, 0, 2)])) / k


def _entropy(counts: NDArray[np.int64]) -> float:
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def _plackett_luce(rows: Array, experts: int) -> float:
    """Bits per row [n, k] under the weights that make the rows likeliest (found by minorization, Hunter 2004)."""
    chosen = np.bincount(rows.ravel(), minlength=experts).astype(np.float64)
    weights = chosen / chosen.sum()
    for _ in range(_ITERATIONS):
        left = _left(weights[rows])
        exposure = np.full(experts, (1 / left).sum())  # of an expert that no row has chosen
        after = np.cumsum((1 / left)[:, ::-1], axis=1)[:, ::-1] - 1 / left  # stages that a chosen one no longer meets
        np.subtract.at(exposure, rows.ravel(), after.ravel())
        weights = chosen / exposure
        weights /= weights.sum()
    return float(-np.log2(weights[rows] / _left(weights[rows])).sum(axis=1).mean())


def _left(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weight that is left to choose from at each stage, [n, k]."""
    return np.maximum(1 - np.cumsum(weights, axis=1) + weights, 1e-12)
