"""Importance-weighted policy gradient without a trust region: w = min(r, C).

C infinite is pg-is. A finite C is pg-tis, which MiniMax-M1 (arXiv 2506.13585) calls CISPO; only the upper side is
capped, and the capped weight keeps its gradient.

Example: mu = 1e-4, pi = .01: r = 100; pg-is weighs 100, cispo with C = 5 weighs 5.
"""

from __future__ import annotations

import torch

from learner.losses.form import TokenTerms, TokenValues, truncated_terms
from leeway.config.algorithms import LossParameters


def decide(values: TokenValues, parameters: LossParameters) -> TokenTerms:
    """Keep every token."""
    return truncated_terms(values.ratio, torch.ones_like(values.ratio, dtype=torch.bool), parameters.truncation)
