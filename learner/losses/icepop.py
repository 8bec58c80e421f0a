"""IcePop: tokens whose ratio left an interval on either side have no gradient (Ring-1T, arXiv 2510.18855).

w = r where alpha <= r <= beta, else 0, whatever the advantage; alpha = .5 and beta = 5 (ratio_low, ratio_high); C
infinite.

Example: r = [.4, .5, 1.5, 5, 5.1]: w = [0, .5, 1.5, 5, 0].
"""

from __future__ import annotations

from learner.losses.form import TokenTerms, TokenValues, truncated_terms
from leeway.config.algorithms import LossParameters


def decide(values: TokenValues, parameters: LossParameters) -> TokenTerms:
    """Keep ratios inside the closed interval."""
    kept = (values.ratio >= parameters.ratio_low) & (values.ratio <= parameters.ratio_high)
    return truncated_terms(values.ratio, kept, parameters.truncation)
