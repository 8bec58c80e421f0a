"""Trust region masking: a sequence with one token too far from mu is dropped whole (arXiv 2512.23075). Batch-aware.

M = 0 for all tokens of a sequence iff max_t D_t > eps, whatever r and the advantage; w = M min(r, C), C infinite. eps
is delta_high where A > 0, else delta_low; the source bounds the largest token KL, here the binary one with eps = .05,
or `divergence`. A staleness-aware delta gives each token an eps of its own.

Example: mu = [.5, .99], pi = [.5, .8], A = -1: D = [0, .181], the second token drops both; without it the first stays.
"""

from __future__ import annotations

import torch
from torch import Tensor

from learner.losses.batch_statistics import BatchStatistics
from learner.losses.divergences import divergence
from learner.losses.form import TokenTerms, TokenValues, delta_high, delta_low, truncated_terms
from leeway.config.algorithms import LossParameters
from leeway.errors import PreconditionError


def measure(values: TokenValues, parameters: LossParameters, num_sequences: int) -> BatchStatistics:
    """The largest excess D - eps of each sequence: above zero drops it. [N], -inf where it has no token here."""
    excess = _excess(values, divergence(values, parameters.divergence), parameters)
    largest = torch.full((num_sequences,), -torch.inf, dtype=excess.dtype, device=excess.device)
    return BatchStatistics(maxima={"excess": largest.scatter_reduce(0, _sequences(values), excess, "amax")})


def decide(values: TokenValues, parameters: LossParameters) -> TokenTerms:
    """Keep the sequences that are inside as a whole."""
    if values.statistics is None:
        raise PreconditionError("trm needs statistics of the whole step: measure before deciding")
    kept = values.statistics.maxima["excess"][_sequences(values)] <= 0
    return truncated_terms(values.ratio, kept, parameters.truncation, divergence(values, parameters.divergence))


def _excess(values: TokenValues, distance: Tensor, parameters: LossParameters) -> Tensor:
    """[T] D - eps, exact in its sign: a difference of floats is zero only where they are equal."""
    up = torch.as_tensor(delta_high(values, parameters), dtype=distance.dtype)
    down = torch.as_tensor(delta_low(values, parameters), dtype=distance.dtype)
    return distance - torch.where(values.advantages > 0, up, down)


def _sequences(values: TokenValues) -> Tensor:
    if values.sequence_ids is None:
        raise PreconditionError("trm needs to know which sequence each token belongs to")
    return values.sequence_ids
