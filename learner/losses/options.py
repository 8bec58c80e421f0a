"""Options of the loss: keys of [learner.training], and what `leeway loss` takes. Needs no torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from learner.losses import (
    MAX_TOPK,
    Algorithm,
    DivergenceName,
    KlEstimator,
    LossParameters,
    Penalties,
    find_algorithm,
)
from learner.losses.aggregation import Aggregation
from leeway.config import Options, SamplingOptions
from leeway.errors import ConfigError


def _registered(name: str) -> str:
    try:
        find_algorithm(name)
    except ConfigError as error:
        raise ValueError(error.message) from error
    return name


class LossOptions(Options):
    """Which loss, its numbers, and how token losses become one. An algorithm ignores numbers that it does not read."""

    algorithm: Annotated[str, AfterValidator(_registered)] = Field(
        default="dppo-binary-tv", description="the policy loss; learner/losses/__init__.py lists the names"
    )
    delta_low: float | None = Field(
        default=None,
        ge=0,
        description="trust-region threshold where the advantage is negative; unset: the algorithm's own",
    )
    delta_high: float | None = Field(
        default=None,
        ge=0,
        description="trust-region threshold where the advantage is positive; unset: the algorithm's own",
    )
    truncation: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=True,
        description="C: the largest weight of a ratio, `inf` for none; unset: the algorithm's own",
    )
    ratio_low: float | None = Field(default=None, ge=0, description="icepop's alpha; unset: its own")
    ratio_high: float | None = Field(default=None, gt=0, description="icepop's beta; unset: its own")
    divergence: DivergenceName | None = Field(
        default=None, description="what trm and predictive-mask compare with delta; unset: the algorithm's own"
    )
    topk: int = Field(
        default=MAX_TOPK,
        ge=1,
        le=MAX_TOPK,
        description="K of the top-K divergences: the likeliest of the recorded candidates; sampling.topk at most",
    )

    delta_growth: float = Field(
        default=0.0,
        ge=-1,
        le=100,
        description="per step of a token's staleness, delta grows by this fraction of itself; negative shrinks it",
    )
    delta_growth_limit: float = Field(
        default=2.0, ge=1, le=1e6, description="staleness moves delta by at most this factor"
    )
    mismatch_allowance: float = Field(
        default=0.0,
        ge=0,
        le=1e6,
        description="multiple of the mean divergence at staleness zero, which is numerics, that is added to delta",
    )

    quadratic_coefficient: float = Field(
        default=0.0, ge=0, description="of (log r)^2, added on every token; prime-rl uses 1e-3"
    )
    reference_kl_coefficient: float = Field(
        default=0.0, ge=0, description="of the divergence from the initial model on every token"
    )
    reference_kl_estimator: KlEstimator = Field(
        default="k2", description="how it is estimated from the sampled token; k3 is GRPO's"
    )
    entropy_coefficient: float = Field(
        default=0.0, description="of the entropy bonus on every token; positive spreads the policy"
    )

    aggregation: Aggregation = Field(
        default="seq-mean-token-sum", description="how token losses become the step's loss"
    )
    horizon: int | None = Field(
        default=None, ge=1, description="tokens to divide by; for aggregation fixed-horizon only"
    )

    @model_validator(mode="after")
    def _horizon_belongs_to_its_aggregation(self) -> LossOptions:
        if (self.aggregation == "fixed-horizon") != (self.horizon is not None):
            raise ValueError("set `horizon` with aggregation = fixed-horizon, and only then")
        return self

    @model_validator(mode="after")
    def _numbers_fit_the_algorithm(self) -> LossOptions:
        parameters = self.loss_parameters
        if self.algorithm == "drpo" and not (parameters.delta_low > 0 and parameters.delta_high > 0):
            raise ValueError("drpo divides by delta: set `delta_low` and `delta_high` above 0")
        if parameters.ratio_low > parameters.ratio_high:
            raise ValueError("`ratio_low` is above `ratio_high`: no ratio would be kept")
        return self

    @property
    def loss_algorithm(self) -> Algorithm:
        """The registered algorithm."""
        return find_algorithm(self.algorithm)

    @property
    def loss_parameters(self) -> LossParameters:
        """The algorithm's numbers, with what is set here in their place; no mismatch was measured yet."""
        parameters = self.loss_algorithm.with_numbers(
            {
                "delta_low": self.delta_low,
                "delta_high": self.delta_high,
                "truncation": self.truncation,
                "ratio_low": self.ratio_low,
                "ratio_high": self.ratio_high,
                "divergence": self.divergence,
            }
        )
        return replace(
            parameters,
            delta_growth=self.delta_growth,
            delta_growth_limit=self.delta_growth_limit,
            mismatch_allowance=self.mismatch_allowance,
        )

    @property
    def penalties(self) -> Penalties:
        """The terms that are added to the loss."""
        return Penalties(
            quadratic=self.quadratic_coefficient,
            reference_kl=self.reference_kl_coefficient,
            reference_kl_estimator=self.reference_kl_estimator,
            entropy=self.entropy_coefficient,
        )

    @property
    def topk_needed(self) -> int:
        """K of the candidates that the loss needs; 0 for none."""
        return self.topk if self.loss_algorithm.reads_topk(self.loss_parameters) else 0


def check_recorded_topk(options: LossOptions, sampling: SamplingOptions) -> None:
    """Refuse a top-K loss where sampling records fewer candidates.

    Raises:
        ConfigError: naming both keys.
    """
    if options.topk_needed > sampling.topk:
        raise ConfigError(
            f"learner.training.algorithm {options.algorithm} needs the top {options.topk_needed} candidates of each "
            f"token, but sampling.topk is {sampling.topk}; set sampling.topk = {options.topk_needed}, or a smaller "
            "learner.training.topk"
        )
