"""Options of the training itself: the loss, the optimizer, and how a step is cut into micro-batches."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from learner.advantages import Baseline
from learner.loss_options import LossOptions

Beta = Annotated[float, Field(ge=0, lt=1)]


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
    load_balancing: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="coefficient of the routers' load-balancing loss, for Qwen3-MoE and Mixtral; 0 for none",
    )
    publish_dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default="bfloat16", description="precision of the weights that are sent to inference servers"
    )
