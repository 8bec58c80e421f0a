"""The policy losses by name. Importing this package needs no torch; `learner.losses.form.load_algorithm` does.

An algorithm is one file with a function `decide(values, parameters) -> TokenTerms` and one line in `ALGORITHMS`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from leeway.errors import ConfigError

INFINITY = math.inf


@dataclass(frozen=True, slots=True)
class LossParameters:
    """The numbers of a loss."""

    delta_low: float  # threshold where the advantage is negative
    delta_high: float  # threshold where the advantage is positive
    truncation: float  # C: the largest weight that a ratio may have; may be infinite


@dataclass(frozen=True, slots=True)
class Algorithm:
    """Where a loss lives and the numbers that its source uses."""

    module: str  # defines `decide`
    defaults: LossParameters

    def parameters(self, delta_low: float | None, delta_high: float | None, truncation: float | None) -> LossParameters:
        """The defaults, with what is set in their place."""
        return LossParameters(
            self.defaults.delta_low if delta_low is None else delta_low,
            self.defaults.delta_high if delta_high is None else delta_high,
            self.defaults.truncation if truncation is None else truncation,
        )


ALGORITHMS: dict[str, Algorithm] = {
    "dppo-binary-tv": Algorithm("learner.losses.dppo_binary_tv", LossParameters(0.2, 0.2, 5.0)),
    "dppo-binary-kl": Algorithm("learner.losses.dppo_binary_kl", LossParameters(0.05, 0.05, 5.0)),
    "pg-is": Algorithm("learner.losses.importance_sampling", LossParameters(INFINITY, INFINITY, INFINITY)),
    "cispo": Algorithm("learner.losses.importance_sampling", LossParameters(INFINITY, INFINITY, 5.0)),
    "grpo": Algorithm("learner.losses.ratio_clip", LossParameters(0.2, 0.2, INFINITY)),
    "grpo-clip-higher": Algorithm("learner.losses.ratio_clip", LossParameters(0.2, 0.28, INFINITY)),
}


def find_algorithm(name: str) -> Algorithm:
    """Look an algorithm up.

    Raises:
        ConfigError: no such name; lists those that exist.
    """
    try:
        return ALGORITHMS[name]
    except KeyError:
        raise ConfigError(f"there is no algorithm {name!r}; choose one of {', '.join(ALGORITHMS)}") from None
