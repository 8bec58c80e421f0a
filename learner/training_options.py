"""Options of the training itself: the loss, the optimizer, and how a step is cut into micro-batches."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from learner.losses import Algorithm, LossParameters, find_algorithm
from learner.losses.aggregation import Aggregation
from leeway.config import Options
from leeway.errors import ConfigError


def _registered(name: str) -> str:
    try:
        find_algorithm(name)
    except ConfigError as error:
        raise ValueError(error.message) from error
    return name


Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainingOptions(Options):
    """[learner.training]: how one optimizer step is made from a step's groups."""

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
        default=None, gt=0, description="C: the largest weight of a ratio, `inf` for none; unset: the algorithm's own"
    )
    divide_by_std: bool = Field(default=False, description="divide advantages by their group's standard deviation")
    aggregation: Aggregation = Field(
        default="seq-mean-token-sum", description="how token losses become the step's loss"
    )
    horizon: int | None = Field(
        default=None, ge=1, description="tokens to divide by; for aggregation fixed-horizon only"
    )

    learning_rate: float = Field(
        default=1e-6, gt=0, allow_inf_nan=False, description="AdamW's learning rate after warm-up"
    )
    warmup_steps: int = Field(default=0, ge=0, description="steps over which the learning rate rises linearly")
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.95), strict=False, description="AdamW's decay rates")
    epsilon: float = Field(default=1e-8, gt=0, allow_inf_nan=False, description="AdamW's denominator term")
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False, description="AdamW's decay of matrices")
    max_gradient_norm: float = Field(
        default=1.0, gt=0, description="the gradient is scaled down to this norm; `inf` for none"
    )

    micro_batch_tokens: int = Field(
        default=16384, ge=1, description="most tokens, padding included, in one forward pass"
    )
    row_tokens: int = Field(
        default=32,
        ge=1,
        description="trajectories are packed into rows of this many tokens, or of the longest trajectory",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="recompute layers in the backward pass to save memory"
    )
    head: Literal["fused", "reference"] = Field(
        default="fused",
        description="how logits become a loss: fused, in chunks with the gradient in the same pass; or reference, by "
        "autograd over all of a micro-batch's logits, which gives the same numbers",
    )
    routing_replay: bool = Field(default=False, description="R3: train with the expert choices that the engine made")
    publish_dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default="bfloat16", description="precision of the weights that are sent to inference servers"
    )

    @model_validator(mode="after")
    def _horizon_belongs_to_its_aggregation(self) -> TrainingOptions:
        if (self.aggregation == "fixed-horizon") != (self.horizon is not None):
            raise ValueError("set `horizon` with aggregation = fixed-horizon, and only then")
        return self

    @property
    def loss_algorithm(self) -> Algorithm:
        """The registered algorithm."""
        return find_algorithm(self.algorithm)

    @property
    def loss_parameters(self) -> LossParameters:
        """The algorithm's numbers, with what is set here in their place."""
        return self.loss_algorithm.parameters(self.delta_low, self.delta_high, self.truncation)
