"""The policy loss: keys of [learner.training], and what `leeway loss` takes."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from leeway.config.algorithms import (
    ALGORITHMS,
    MAX_TOPK,
    Algorithm,
    DivergenceName,
    KlEstimator,
    LossParameters,
    Penalties,
)
from leeway.config.document import Options, Registered

Aggregation = Literal["seq-mean-token-sum", "token-mean", "seq-mean-token-mean", "fixed-horizon"]


class LossOptions(Options):
    """Which loss, its numbers, and how token losses become one. An algorithm ignores numbers that it does not read."""

    algorithm: Annotated[str, AfterValidator(Registered("algorithm", ALGORITHMS))] = Field(
        default="dppo-binary-tv",
        description="Policy loss, by name; `leeway loss --help` lists the names, and each is a file of learner/losses.",
    )
    delta_low: float | None = Field(
        default=None,
        ge=0,
        description="Trust-region threshold where the advantage is negative. Unset: the algorithm's own.",
    )
    delta_high: float | None = Field(
        default=None,
        ge=0,
        description="Trust-region threshold where the advantage is positive. Unset: the algorithm's own.",
    )
    truncation: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=True,
        description="Largest weight that a ratio may have, C; `inf` for no bound. Unset: the algorithm's own.",
    )
    ratio_low: float | None = Field(
        default=None, ge=0, description="Smallest ratio that icepop keeps, its alpha. Unset: the algorithm's own."
    )
    ratio_high: float | None = Field(
        default=None, gt=0, description="Largest ratio that icepop keeps, its beta. Unset: the algorithm's own."
    )
    divergence: DivergenceName | None = Field(
        default=None, description="Divergence that trm and predictive-mask bound. Unset: the algorithm's own."
    )
    topk: int = Field(
        default=MAX_TOPK,
        ge=1,
        le=MAX_TOPK,
        description="Candidates of the top-K divergences: the K likeliest of those recorded; at most sampling.topk.",
    )

    delta_growth: float = Field(
        default=0.0,
        ge=-1,
        le=100,
        description="Fraction by which delta grows per step of a token's staleness; a negative one shrinks it.",
    )
    delta_growth_limit: float = Field(
        default=2.0, ge=1, le=1e6, description="Largest factor by which staleness may grow or shrink delta."
    )
    mismatch_allowance: float = Field(
        default=0.0,
        ge=0,
        le=1e6,
        description="Multiple of the mean divergence at staleness zero, which is numerics alone, that is added to "
        "delta.",
    )

    quadratic_coefficient: float = Field(
        default=0.0, ge=0, description="Coefficient of (log ratio)^2, added on every token; prime-rl uses 1e-3."
    )
    reference_kl_coefficient: float = Field(
        default=0.0, ge=0, description="Coefficient of the divergence from the initial model, added on every token."
    )
    reference_kl_estimator: KlEstimator = Field(
        default="k2", description="Estimator of the divergence from the initial model; k3 is GRPO's."
    )
    entropy_coefficient: float = Field(
        default=0.0, description="Coefficient of the entropy bonus on every token; a positive one spreads the policy."
    )

    aggregation: Aggregation = Field(
        default="seq-mean-token-sum", description="How the losses of tokens become the loss of a step."
    )
    horizon: int | None = Field(
        default=None, ge=1, description="Tokens by which aggregation fixed-horizon divides; for no other aggregation."
    )

    @model_validator(mode="after")
    def _horizon_belongs_to_its_aggregation(self) -> LossOptions:
        if (self.aggregation == "fixed-horizon") != (self.horizon is not None):
            raise ValueError("set `horizon` with aggregation = fixed-horizon, and only then")
        return self

    @model_validator(mode="after")
    def _numbers_fit_the_algorithm(self) -> LossOptions:
        parameters = self.loss_parameters
        if self.loss_algorithm.divides_by_delta and not (parameters.delta_low > 0 and parameters.delta_high > 0):
            raise ValueError(f"{self.algorithm} divides by delta: set `delta_low` and `delta_high` above 0")
        if parameters.ratio_low > parameters.ratio_high:
            raise ValueError("`ratio_low` is above `ratio_high`: no ratio would be kept")
        return self

    @property
    def loss_algorithm(self) -> Algorithm:
        """The registered algorithm."""
        return ALGORITHMS[self.algorithm]

    @property
    def loss_parameters(self) -> LossParameters:
        """The algorithm's numbers, with what is set here in their place; no mismatch was measured yet."""
        names = {field.name for field in fields(LossParameters)}
        return self.loss_algorithm.with_numbers({name: value for name, value in self if name in names})

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
