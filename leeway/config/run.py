"""The run itself: its size, its model, its tasks, how they are sampled and evaluated."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pydantic import Field, model_validator

from leeway.config.document import ConfigPath, Options
from leeway.errors import ConfigError
from leeway.types import SamplingParams


class RunOptions(Options):
    """[run]: what is trained, for how long, and how stale data may be."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
        description="Name of the run and of its folder: letters, digits, dots, dashes and underscores.",
    )
    directory: ConfigPath = Field(
        default=Path("runs"), description="Folder that holds one folder per run.", validate_default=True
    )
    steps: int = Field(ge=1, description="Optimizer steps of the whole run.")
    groups_per_step: int = Field(ge=1, description="Trajectory groups per optimizer step; the batch size.")
    members: int = Field(ge=1, description="Trajectories per group: the samples of one prompt that are compared.")
    max_staleness: int = Field(
        ge=0,
        le=1000,
        description="Largest staleness of a trained token: the optimizer steps between the version that sampled it and "
        "the version that trains on it. 0 is on-policy.",
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="Seed of the task order, of sampling and of training.")
    max_attempts: int = Field(
        default=5, ge=1, description="Tickets that a group may cost before it is set aside as a dead letter."
    )
    drop_no_signal: bool = Field(
        default=False,
        description="Drop groups whose rewards are all equal, in the buffer; other groups then fill the step.",
    )

    @model_validator(mode="after")
    def _signal_needs_members(self) -> RunOptions:
        if self.drop_no_signal and self.members < 2:
            raise ValueError("drop_no_signal needs at least 2 members: the reward of one is always equal to itself")
        return self

    @property
    def run_directory(self) -> Path:
        return self.directory / self.name


class ModelOptions(Options):
    """[model]: the policy that the run starts from."""

    path: ConfigPath | None = Field(
        default=None, description="Hugging Face model directory with its tokenizer. A rehearsal needs none."
    )

    @property
    def directory(self) -> Path:
        """`path`, for those who need it.

        Raises:
            ConfigError: it is not set.
        """
        if self.path is None:
            raise ConfigError("model.path: required, but not set; give a Hugging Face model directory")
        return self.path


class TaskOptions(Options):
    """[task]: the prompts and how completions are scored. Tasks come from a function or from JSONL files."""

    tasks: str | None = Field(
        default=None, description="Function that makes the tasks: module:function(split, count, seed) -> list of tasks."
    )
    train_count: int = Field(default=4096, ge=1, description="Training tasks that the function makes.")
    heldout_count: int = Field(default=256, ge=0, description="Held-out tasks that the function makes.")
    train_file: ConfigPath | None = Field(
        default=None, description="JSONL file of training tasks: objects with a `prompt`. It replaces `tasks`."
    )
    heldout_file: ConfigPath | None = Field(default=None, description="JSONL file of held-out tasks.")
    reward: str = Field(
        description="Function that scores a completion: module:function(task, completion) -> float, sync or async."
    )
    python_path: ConfigPath = Field(
        default=Path(),
        description="Folder from which the modules of `tasks` and `reward` are imported; installed modules come first.",
        validate_default=True,
    )
    chat: bool = Field(
        default=False, description="Render each prompt as a user message with the model's chat template."
    )

    @model_validator(mode="after")
    def _one_source(self) -> TaskOptions:
        if (self.tasks is None) == (self.train_file is None):
            raise ValueError("set either `tasks` (a function) or `train_file` (JSONL)")
        return self


class SamplingOptions(Options):
    """[sampling]: how training trajectories are sampled and what is recorded with them."""

    temperature: float = Field(
        default=1.0, gt=0, le=10, description="Temperature: logits are divided by it before sampling."
    )
    max_tokens: int = Field(ge=1, description="Most tokens of a completion, the end-of-sequence token included.")
    topk: int = Field(
        default=0, ge=0, le=20, description="Log-probs of the K likeliest tokens are recorded; 0 records none."
    )
    routing: bool = Field(
        default=False, description="Record which experts a mixture of experts chose, for routing replay (R3)."
    )

    def params(self, stop_token_ids: Iterable[int]) -> SamplingParams:
        """The wire form; the seed is each trajectory's own."""
        return SamplingParams(
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            stop_token_ids=tuple(stop_token_ids),
            topk=self.topk,
            routing=self.routing,
        )


class EvaluationOptions(Options):
    """[evaluation]: held-out accuracy, sampled at the training temperature from one pinned version."""

    every_steps: int = Field(
        default=50, ge=0, description="Steps between two evaluations; 0 evaluates only at the start and at the end."
    )
    tasks: int = Field(default=256, ge=0, description="Held-out tasks per evaluation; 0 turns evaluation off.")
    members: int = Field(default=8, ge=1, description="Samples of each held-out task.")
