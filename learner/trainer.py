"""What the learner's loop needs of a trainer: a policy that learns from groups and can be published, saved and loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from leeway.types import ModelSignature, TrajectoryGroup, WeightManifest


class Trainer(Protocol):
    """One policy and its optimizer."""

    @property
    def signature(self) -> ModelSignature:
        """What the model is; servers must match it."""
        ...

    def published(self) -> tuple[WeightManifest, list[bytes]]:
        """The current weights as they are published: manifest and each tensor's bytes in its order."""
        ...

    def train_step(self, step: int, groups: Sequence[TrajectoryGroup]) -> Mapping[str, float]:
        """Take one optimizer step; return its statistics by name.

        Raises:
            UnusableGroupError: a group cannot be trained on; nothing has changed.
        """
        ...

    def save(self, directory: Path) -> None:
        """Write weights and optimizer into an existing empty directory."""
        ...

    def load(self, directory: Path) -> None:
        """Become what `save` wrote there."""
        ...
