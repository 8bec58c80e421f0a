"""The policy losses by name, and their numbers. `learner.losses.form.load_algorithm` imports the loss itself.

An algorithm is one file in learner/losses with a function `decide(values, parameters) -> TokenTerms`, and one line in
`ALGORITHMS`. There are two kinds. A token-local loss decides from a token alone. A batch-aware loss also has `measure`
(see `learner.losses.batch_statistics`) and decides after a pass without gradient over the whole step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

INFINITY = math.inf
MAX_TOPK: Final = 20
"""K of the paper, and the most candidates that an engine records."""

DivergenceName = Literal["binary-tv", "binary-kl", "topk-tv", "topk-kl"]
KlEstimator = Literal["k2", "k3"]


@dataclass(frozen=True, slots=True)
class LossParameters:
    """The numbers of a loss; each loss's docstring says which ones it reads."""

    delta_low: float  # threshold where the advantage is negative
    delta_high: float  # threshold where the advantage is positive
    truncation: float  # C: the largest weight that a ratio may have; may be infinite
    ratio_low: float = 0.0  # alpha: smallest ratio that icepop keeps
    ratio_high: float = INFINITY  # beta: largest ratio that icepop keeps
    divergence: DivergenceName = "binary-tv"  # of the losses that let one choose
    delta_growth: float = 0.0  # per step of staleness, as a fraction of delta
    delta_growth_limit: float = 2.0  # delta stays within delta / limit and delta * limit
    mismatch: float = 0.0  # mean divergence of tokens of staleness zero: what the engines' numerics alone make of it
    mismatch_allowance: float = 0.0  # multiple of `mismatch` that is added to delta


@dataclass(frozen=True, slots=True)
class Penalties:
    """Coefficients of the terms that are added to any loss; one of 0 costs nothing."""

    quadratic: float = 0.0  # of (log r)^2
    reference_kl: float = 0.0  # of the divergence from the initial model
    reference_kl_estimator: KlEstimator = "k2"
    entropy: float = 0.0  # bonus: positive keeps the policy spread out

    @property
    def active(self) -> bool:
        """Whether every trained token has a gradient, with an advantage or without."""
        return bool(self.quadratic or self.reference_kl or self.entropy)


NO_PENALTIES = Penalties()


@dataclass(frozen=True, slots=True)
class Algorithm:
    """Where a loss lives, the numbers that its source uses, and what it needs beside mu and pi."""

    module: str  # defines `decide`, and `measure` where batch_aware
    defaults: LossParameters
    chooses_divergence: bool = False  # reads `divergence`
    needs_topk: bool = False  # whatever the divergence
    needs_proximal: bool = False  # log-probs of pi_old, the learner a few steps ago
    batch_aware: bool = False  # needs statistics of the whole step first
    divides_by_delta: bool = False  # a threshold of 0 has no meaning

    def with_numbers(self, numbers: Mapping[str, Any]) -> LossParameters:
        """The defaults, with every number that is not None in its place."""
        return replace(self.defaults, **{name: value for name, value in numbers.items() if value is not None})

    def reads_topk(self, parameters: LossParameters) -> bool:
        """Whether the loss needs recorded candidates."""
        return self.needs_topk or (self.chooses_divergence and parameters.divergence.startswith("topk"))


def _numbers(delta: float, truncation: float = INFINITY) -> LossParameters:
    return LossParameters(delta, delta, truncation)


_CLIP_HIGHER = LossParameters(0.2, 0.28, INFINITY)
_BINARY_KL = LossParameters(0.05, 0.05, INFINITY, divergence="binary-kl")
_TOPK_TV = LossParameters(0.2, 0.2, INFINITY, divergence="topk-tv")
_ICEPOP = LossParameters(INFINITY, INFINITY, INFINITY, ratio_low=0.5, ratio_high=5.0)

ALGORITHMS: dict[str, Algorithm] = {
    "dppo-binary-tv": Algorithm("learner.losses.dppo_binary_tv", _numbers(0.2, 5.0)),
    "dppo-binary-kl": Algorithm("learner.losses.dppo_binary_kl", _numbers(0.05, 5.0)),
    "dppo-topk-tv": Algorithm("learner.losses.dppo_topk_tv", _numbers(0.2, 5.0), needs_topk=True),
    "dppo-topk-kl": Algorithm("learner.losses.dppo_topk_kl", _numbers(0.05, 5.0), needs_topk=True),
    "pg-is": Algorithm("learner.losses.importance_sampling", _numbers(INFINITY)),
    "cispo": Algorithm("learner.losses.importance_sampling", _numbers(INFINITY, 5.0)),
    "grpo": Algorithm("learner.losses.ratio_clip", _numbers(0.2)),
    "grpo-clip-higher": Algorithm("learner.losses.ratio_clip", _CLIP_HIGHER),
    "minirl": Algorithm("learner.losses.minirl", _CLIP_HIGHER, needs_proximal=True),
    "minirl-tis": Algorithm("learner.losses.minirl", replace(_CLIP_HIGHER, truncation=3.0), needs_proximal=True),
    "minimal-mask": Algorithm("learner.losses.minimal_mask", _numbers(0.5)),
    "drpo": Algorithm("learner.losses.drpo", _numbers(0.2), divides_by_delta=True),
    "predictive-mask": Algorithm("learner.losses.predictive_mask", _TOPK_TV, chooses_divergence=True, needs_topk=True),
    "trm": Algorithm("learner.losses.trm", _BINARY_KL, chooses_divergence=True, batch_aware=True),
    "icepop": Algorithm("learner.losses.icepop", _ICEPOP),
    "decoupled-ppo": Algorithm("learner.losses.decoupled_ppo", _numbers(0.2), needs_proximal=True),
}
