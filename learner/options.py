"""[learner]: the loop around the trainer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from learner.fleet.options import FleetOptions
from learner.training.options import TrainingOptions
from leeway.config import Options


class LearnerOptions(Options):
    """The learner's loop; how it trains is in [learner.training]."""

    trainer: Literal["torch", "arithmetic"] = Field(
        default="torch", description="arithmetic rehearses a run without torch: its weights are a counter"
    )
    training: TrainingOptions = Field(default_factory=TrainingOptions)
    fleet: FleetOptions = FleetOptions()
    num_threads: int = Field(default=1, ge=1, le=1024, description="torch threads of the trainer on a CPU")
    ranks: int = Field(
        default=1,
        ge=1,
        description="processes that share the weights (FSDP2); `leeway run` starts them with torchrun",
    )
    publish_every: int = Field(
        default=1,
        ge=1,
        description="steps between published versions; more than max_staleness + 1 would starve the run",
    )
    max_delta_chain: int = Field(
        default=8,
        ge=0,
        le=256,
        description="newest versions from which servers are sent only what changed; 0 sends whole snapshots",
    )
    broadcast_patience_seconds: float = Field(
        default=10.0,
        gt=0,
        le=600,
        description="longest silence of one server in a broadcast (network.weights = collective), "
        "per piece; then all of them fetch that version over gRPC",
    )
    checkpoint_every_steps: int = Field(
        default=50, ge=1, description="steps between checkpoints; a crash repeats at most this many"
    )
    keep_checkpoints: int = Field(default=2, ge=1, description="newest checkpoints kept on disk")
    draw_timeout_seconds: float = Field(
        default=300.0, gt=0, description="longest wait for a batch before the learner gives up and names the blocker"
    )
    evaluation_timeout_seconds: float = Field(
        default=300.0, gt=0, description="longest time that an evaluation may hold back newer versions"
    )
    stop_seconds: float = Field(
        default=60.0,
        gt=0,
        description="longest time that `leeway run` gives a stopping learner to finish its step and write a checkpoint",
    )
    record_policy_logprobs: bool = Field(
        default=True, description="keep the learner's log-prob of every trained token, for `leeway rollouts`"
    )

    @model_validator(mode="after")
    def _ranks_train_with_torch(self) -> LearnerOptions:
        if self.ranks > 1 and self.trainer != "torch":
            raise ValueError("`ranks` above 1 needs trainer = torch")
        return self
