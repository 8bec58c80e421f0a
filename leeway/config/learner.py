"""The learner: its loop, its training, and its watch over the servers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from leeway.config.document import Options
from leeway.config.losses import LossOptions

Baseline = Literal["group-mean", "leave-one-out"]
OverlongRule = Literal["keep", "mask", "drop"]
Schedule = Literal["constant", "linear", "cosine"]
Beta = Annotated[float, Field(ge=0, lt=1)]


class LoraOptions(Options):
    """[learner.training.lora]: low-rank adapters are trained instead of the weights themselves."""

    rank: int = Field(default=16, ge=1, description="Rank of what an adapter adds to a weight.")
    alpha: float = Field(default=32.0, gt=0, description="Scale of an adapter, divided by its rank: alpha / rank.")
    targets: tuple[str, ...] = Field(
        default=("q_proj", "k_proj", "v_proj", "o_proj"),
        strict=False,
        min_length=1,
        description="Names of the linear layers that get an adapter; fused experts cannot have one.",
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="Seed of the adapters' first weights.")


class TrainingOptions(LossOptions):
    """[learner.training]: how one optimizer step is made from a step's groups."""

    baseline: Baseline = Field(
        default="group-mean",
        description="What a reward is compared with: the mean of its group, or the mean of the group's other members.",
    )
    divide_by_std: bool = Field(
        default=False, description="Divide advantages by the standard deviation of their group's rewards."
    )
    proximal_every_steps: int = Field(
        default=1,
        ge=1,
        description="Steps between two copies of the learner as pi_old, for minirl, minirl-tis and decoupled-ppo. 1 is "
        "the learner itself before the step: no copy is kept and the ratio is 1.",
    )
    mismatch_memory_steps: int = Field(
        default=100, ge=1, description="Steps over which the divergence at staleness zero is averaged."
    )

    learning_rate: float = Field(default=1e-6, gt=0, description="Learning rate of AdamW after the warm-up.")
    warmup_steps: int = Field(default=0, ge=0, description="Steps over which the learning rate rises linearly from 0.")
    schedule: Schedule = Field(default="constant", description="Course of the learning rate after the warm-up.")
    decay_steps: int | None = Field(
        default=None, ge=1, description="Step at which linear and cosine reach their floor; usually run.steps."
    )
    learning_rate_floor: float = Field(default=0.0, ge=0, description="Lowest learning rate of linear and cosine.")
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.95), strict=False, description="Decay rates of AdamW's moments.")
    epsilon: float = Field(default=1e-8, gt=0, description="Term of AdamW's denominator.")
    weight_decay: float = Field(default=0.0, ge=0, description="Decay of matrices by AdamW.")
    max_gradient_norm: float = Field(
        default=1.0,
        gt=0,
        allow_inf_nan=True,
        description="Norm to which a larger gradient is scaled down; `inf` for no bound.",
    )

    overlong: OverlongRule = Field(
        default="keep",
        description="What becomes of trajectories that a token limit cut off: keep; mask (no gradient, but they count "
        "in the baseline and in the loss's normalisation); drop (as if never sampled).",
    )
    overlong_limit: int | None = Field(
        default=None,
        ge=1,
        description="Length at which the soft over-long penalty is 1, in completion tokens: L_max. Unset: no penalty.",
    )
    overlong_cache: int | None = Field(
        default=None,
        ge=1,
        description="Tokens before overlong_limit over which the penalty grows from 0 to 1: L_cache.",
    )

    compute_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Precision of matrix products; weights, gradients and moments are always float32.",
    )
    micro_batch_tokens: int = Field(
        default=16384, ge=1, description="Most tokens, padding included, in one forward pass."
    )
    row_tokens: int = Field(
        default=32,
        ge=1,
        description="Length of the rows that trajectories are packed into; a longer trajectory makes all rows as long.",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute layers in the backward pass, to save memory."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Device to train on; auto is a GPU where PyTorch finds one."
    )
    head: Literal["fused", "reference"] = Field(
        default="fused",
        description="How logits become a loss: fused, in chunks with the gradient in the same pass; or reference, by "
        "autograd over all logits of a micro-batch, with the same numbers.",
    )
    routing_replay: bool = Field(
        default=False, description="Train with the expert choices that the engine recorded (R3)."
    )
    load_balancing: float = Field(
        default=0.0,
        ge=0,
        description="Coefficient of the routers' load-balancing loss, for Qwen3-MoE and Mixtral; 0 for none.",
    )
    lora: LoraOptions | None = Field(
        default=None, description="Adapters that are trained in place of the weights. Unset: every weight is trained."
    )
    publish_dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default="bfloat16", description="Precision of the weights that are sent to inference servers."
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


class FleetOptions(Options):
    """[learner.fleet]: when a server diverges or is slow; docs/fleet.md says how both are measured."""

    drain: bool = Field(
        default=True,
        description="Take such servers out of the run; false only names them, in the log and in the metrics.",
    )
    max_excess_nats: float = Field(
        default=0.2,
        gt=0,
        le=100,
        description="A server diverges when its mean |log pi - log mu| surely exceeds that of the others by more than "
        "this.",
    )
    min_tokens: int = Field(default=2000, ge=1, description="Fewest tokens by which a server is judged.")
    window_steps: int = Field(default=20, ge=1, le=10_000, description="Newest steps whose tokens count.")
    slow_ratio: float = Field(
        default=20.0,
        ge=2,
        allow_inf_nan=True,
        description="A server is slow when its median group takes this many times as long as the others' groups. "
        "`inf`: no server is slow.",
    )
    slow_seconds: float = Field(
        default=60.0, ge=0, description="A server is slow only when its median group takes at least this long."
    )
    min_groups: int = Field(
        default=16, ge=1, le=32, description="Fewest groups of a server whose median is compared with the others'."
    )
    check_seconds: float = Field(
        default=10.0,
        gt=0,
        le=3600,
        description="Longest time between two checks of the servers; each step brings a check, too.",
    )


class LearnerOptions(Options):
    """[learner]: the loop that draws groups, trains and publishes weights."""

    trainer: Literal["torch", "arithmetic"] = Field(
        default="torch",
        description="What trains; arithmetic rehearses a run without PyTorch: its weights are a counter.",
    )
    num_threads: int = Field(default=1, ge=1, le=1024, description="PyTorch threads of the trainer on a CPU.")
    ranks: int = Field(
        default=1,
        ge=1,
        description="Processes that share the weights (FSDP2); `leeway run` starts them with torchrun.",
    )
    publish_every: int = Field(
        default=1,
        ge=1,
        description="Steps between two published versions; run.max_staleness + 1 at most.",
    )
    max_delta_chain: int = Field(
        default=8,
        ge=0,
        le=256,
        description="Newest versions from which servers receive only what changed; 0 always sends whole snapshots.",
    )
    broadcast_patience_seconds: float = Field(
        default=10.0,
        gt=0,
        le=600,
        description="Longest silence of one server in a broadcast (network.weights = collective), per piece; then all "
        "servers fetch that version over gRPC.",
    )
    checkpoint_every_steps: int = Field(
        default=50, ge=1, description="Steps between two checkpoints; a crash repeats at most this many."
    )
    keep_checkpoints: int = Field(default=2, ge=1, description="Newest checkpoints that are kept on disk.")
    draw_timeout_seconds: float = Field(
        default=300.0,
        gt=0,
        description="Longest wait for a batch; then the learner gives up and names what blocks it.",
    )
    evaluation_timeout_seconds: float = Field(
        default=300.0, gt=0, description="Longest time for which an evaluation may hold back newer versions."
    )
    stop_seconds: float = Field(
        default=60.0,
        gt=0,
        description="Longest time that `leeway run` gives a stopping learner to finish its step and its checkpoint.",
    )
    record_policy_logprobs: bool = Field(
        default=True, description="Keep the learner's log-prob of every trained token, for `leeway rollouts`."
    )
    training: TrainingOptions = Field(default_factory=TrainingOptions)
    fleet: FleetOptions = FleetOptions()

    @model_validator(mode="after")
    def _ranks_train_with_torch(self) -> LearnerOptions:
        if self.ranks > 1 and self.trainer != "torch":
            raise ValueError("`ranks` above 1 needs trainer = torch")
        return self
