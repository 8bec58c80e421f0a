"""The trainer as the learner's loop sees it: a policy that learns from groups, is published, saved and loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import grpc

from learner.lineage import Branch
from leeway.errors import LeewayError
from leeway.types import Float32Array, ModelSignature, TrajectoryGroup, WeightManifest


@dataclass(frozen=True, slots=True)
class StepResult:
    """The result of one optimizer step."""

    statistics: Mapping[str, float]  # by name
    policy_logprobs: Mapping[str, Float32Array]  # trajectory id -> [tokens in the loss], before the step


FinishSave = Callable[[], None]
"""Waits until everything of a checkpoint is written; to be called once, from any thread."""


class Trainer(Protocol):
    """One policy and its optimizer."""

    @property
    def signature(self) -> ModelSignature:
        """The model's identity; servers must have the same."""
        ...

    @property
    def numerics(self) -> Mapping[str, str]:
        """Everything that decides rounding beside options and data: library versions, processor, device."""
        ...

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion: the tokenizer's end-of-sequence."""
        ...

    def published(self) -> tuple[WeightManifest, list[bytes]]:
        """The current weights as they are published: manifest and each tensor's bytes in its order."""
        ...

    def train_step(self, step: int, groups: Sequence[TrajectoryGroup], branches: Sequence[Branch] = ()) -> StepResult:
        """Take one optimizer step.

        Args:
            step: its number; the head is the version before it.
            groups: what to train on.
            branches: where each of the run's epochs started, for the staleness of tokens.

        Raises:
            UnusableGroupError: a group cannot be trained on; nothing has changed.
        """
        ...

    def begin_save(self, directory: Path) -> FinishSave:
        """Copy what is to be saved, and write it while training goes on; see `save`."""
        ...

    def save(self, directory: Path) -> None:
        """Write weights and optimizer into an existing empty directory."""
        ...

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote."""
        ...


class UnusableGroupError(LeewayError):
    """A drawn group cannot be trained on; names it, and the trajectory at fault. Nothing has changed."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INVALID_ARGUMENT
    reason: ClassVar[str] = "UNUSABLE_GROUP"

    def __init__(self, group_id: str, message: str) -> None:
        super().__init__(f"group {group_id}: {message}")
        self.group_id = group_id
        self.message = message  # without the group, for callers that name it themselves
