"""Options of the training itself: the loss, the optimizer, and how a step is cut into micro-batches."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from learner.batch.advantages import Baseline
from learner.batch.overlong import OverlongRule
from learner.losses.options import LossOptions
from learner.training.schedule import Schedule
from leeway.config import Options

Beta = Annotated[float, Field(ge=0, lt=1)]


class LoraOptions(Options):
    """[learner.training.lora]: train low-rank adapters instead of the weights themselves."""

    rank: int = Field(default=16, ge=1, description="r: the rank of what an adapter adds to a weight")
    alpha: float = Field(default=32.0, gt=0, description="an adapter is scaled by alpha / rank")
    targets: tuple[str, ...] = Field(
        default=("q_proj", "k_proj", "v_proj", "o_proj"),
        strict=False,
        min_length=1,
        description="names of the linear layers that get an adapter; fused experts cannot",
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="seeds the adapters' first weights")


class TrainingOptions(LossOptions):
    """[learner.training]: how one optimizer step is made from a step's groups; the loss has the keys of LossOptions."""

    baseline: Baseline = Field(
        default="group-mean", description="what rewards are compared with: the mean of the group, or of the others"
    )
    divide_by_std: bool = Field(default=False, description="divide advantages by their group's standard deviation")
    proximal_every_steps: int = Field(
        default=1,
        ge=1,
        description="steps between two copies of the learner as pi_old, for minirl, minirl-tis and decoupled-ppo; "
        "1 is the learner itself before the step, which keeps no copy and whose ratio is 1",
    )
    mismatch_memory_steps: int = Field(
        default=100, ge=1, description="steps over which the divergence at staleness zero is averaged"
    )

    learning_rate: float = Field(default=1e-6, gt=0, description="AdamW's learning rate after warm-up")
    warmup_steps: int = Field(default=0, ge=0, description="steps over which the learning rate rises linearly")
    schedule: Schedule = Field(default="constant", description="how the learning rate goes on after the warm-up")
    decay_steps: int | None = Field(
        default=None, ge=1, description="step at which linear and cosine reach the floor; usually run.steps"
    )
    learning_rate_floor: float = Field(default=0.0, ge=0, description="the lowest learning rate of linear and cosine")
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.95), strict=False, description="AdamW's decay rates")
    epsilon: float = Field(default=1e-8, gt=0, description="AdamW's denominator term")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decay of matrices")
    max_gradient_norm: float = Field(
        default=1.0, gt=0, allow_inf_nan=True, description="the gradient is scaled down to this norm; `inf` for none"
    )

    overlong: OverlongRule = Field(
        default="keep",
        description="trajectories cut off by a limit of tokens: keep; mask (no gradient, but in the baseline and in "
        "the counts); drop (as if never sampled)",
    )
    overlong_limit: int | None = Field(
        default=None, ge=1, description="L_max of the soft over-long penalty, in completion tokens; unset: no penalty"
    )
    overlong_cache: int | None = Field(
        default=None, ge=1, description="L_cache: tokens before the limit over which the penalty grows from 0 to 1"
    )

    compute_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="precision of matrix products; weights, gradients and moments are float32 in any case",
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
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="where to compute; auto is a GPU where PyTorch finds one"
    )
    head: Literal["fused", "reference"] = Field(
        default="fused",
        description="how logits become a loss: fused, in chunks with the gradient in the same pass; or reference, by "
        "autograd over all of a micro-batch's logits, which gives the same numbers",
    )
    routing_replay: bool = Field(default=False, description="R3: train with the expert choices that the engine made")
    load_balancing: float = Field(
        default=0.0,
        ge=0,
        description="coefficient of the routers' load-balancing loss, for Qwen3-MoE and Mixtral; 0 for none",
    )
    lora: LoraOptions | None = Field(default=None, description="unset: every weight is trained")
    publish_dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default="bfloat16", description="precision of the weights that are sent to inference servers"
    )

    @model_validator(mode="after")
    def _schedule_has_an_end(self) -> TrainingOptions:
        if (self.schedule == "constant") != (self.decay_steps is None):
            raise ValueError("set `decay_steps` with schedule = linear or cosine, and only then")
        if self.decay_steps is not None and self.decay_steps <= self.warmup_steps:
            raise ValueError("`decay_steps` must be more than `warmup_steps`")
        if self.learning_rate_floor > self.learning_rate:
            raise ValueError("`learning_rate_floor` must not be above `learning_rate`")
        return self

    @model_validator(mode="after")
    def _penalty_is_whole(self) -> TrainingOptions:
        if (self.overlong_limit is None) != (self.overlong_cache is None):
            raise ValueError("set `overlong_limit` and `overlong_cache` together")
        if (self.overlong_cache or 0) > (self.overlong_limit or 0):
            raise ValueError("`overlong_cache` must not be above `overlong_limit`")
        return self
