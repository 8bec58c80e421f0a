"""Statistics of a whole step, for losses that a token alone cannot decide.

    every micro-batch, without gradient: values ── measure ──> BatchStatistics ──┐
    merged over micro-batches, reduced over ranks <──────────────────────────────┘
    every micro-batch, with gradient: values (with the statistics) ── decide ──> terms

Each quantity is a sum or a maximum of what single tokens add, so the order and the cut into micro-batches and ranks do
not matter. A quantity per sequence is a tensor [N] over all sequences of the step, of every rank.

Shape legend: N sequences of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["sum", "max"]
Reduce = Callable[[Tensor, Reduction], Tensor]
"""Combines a tensor over all ranks; every rank calls it for the same quantities in the same order."""


@dataclass(frozen=True, slots=True)
class BatchStatistics:
    """Quantities by name."""

    sums: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    maxima: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


def single_process(tensor: Tensor, _reduction: Reduction) -> Tensor:
    """The `Reduce` of one rank."""
    return tensor


def merge_statistics(parts: Sequence[BatchStatistics]) -> BatchStatistics:
    """Combine the micro-batches of a rank; at least one.

    Example:
        maxima {d: [.1, 0]} and {d: [0, .3]} give {d: [.1, .3]}.
    """
    return BatchStatistics(
        sums={name: torch.stack([part.sums[name] for part in parts]).sum(dim=0) for name in parts[0].sums},
        maxima={name: torch.stack([part.maxima[name] for part in parts]).amax(dim=0) for name in parts[0].maxima},
    )


def reduce_statistics(statistics: BatchStatistics, reduce: Reduce) -> BatchStatistics:
    """Combine the ranks, in the order of the names."""
    return BatchStatistics(
        sums={name: reduce(statistics.sums[name], "sum") for name in sorted(statistics.sums)},
        maxima={name: reduce(statistics.maxima[name], "max") for name in sorted(statistics.maxima)},
    )
