"""A trainer without a model: rehearses a run's whole protocol in seconds, without torch.

Its weights are two numbers: `step` and `history`, a hash over everything it was ever trained on, in order. So the
digest of a published version says which groups led to it. It learns nothing: the arithmetic law, by which engines
sample from those weights, knows of no reward.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final

import numpy as np

from learner.batch.checks import check_group, check_trajectory
from learner.batch.packing import token_temperatures
from learner.lineage import Branch
from learner.trainer import FinishSave, StepResult
from leeway import arithmetic
from leeway.arithmetic import ArithmeticWeights
from leeway.errors import CorruptDataError
from leeway.service.seeds import seed_of
from leeway.types import Float32Array, ModelSignature, Trajectory, TrajectoryGroup, WeightManifest

_FILE: Final = "arithmetic.json"


class ArithmeticTrainer:
    """Implements `learner.trainer.Trainer`."""

    signature: ModelSignature = arithmetic.SIGNATURE
    numerics: Mapping[str, str] = MappingProxyType({})  # integers and float64 alone
    stop_token_ids: tuple[int, ...] = (arithmetic.END_OF_SEQUENCE,)

    def __init__(self) -> None:
        self._history = 0
        self._step = 0

    def published(self) -> tuple[WeightManifest, list[bytes]]:
        return arithmetic.published_weights(self._history, self._step)

    def train_step(self, step: int, groups: Sequence[TrajectoryGroup], branches: Sequence[Branch] = ()) -> StepResult:
        for group in groups:
            check_group(group, lambda trajectory: check_trajectory(trajectory, self.signature, None))
        weights = arithmetic.read_weights(*self.published())
        trajectories = [trajectory for group in groups for trajectory in group.trajectories]
        logprobs = {trajectory.trajectory_id: _policy_logprobs(weights, trajectory) for trajectory in trajectories}
        rewards = np.array([trajectory.reward for trajectory in trajectories])
        behavior = np.concatenate([trajectory.behavior_logprobs[trajectory.loss_mask] for trajectory in trajectories])
        difference = np.exp(np.concatenate(list(logprobs.values()))) - np.exp(behavior)
        self._history, self._step = _next_history(self._history, step, groups), step
        return StepResult(
            statistics={
                "loss": 0.0,
                "reward_mean": float(rewards.mean()),
                "reward_std": float(rewards.std()),
                "num_sequences": float(len(trajectories)),
                "num_trained_tokens": float(behavior.size),
                "mean_abs_policy_behavior_difference": float(np.abs(difference).mean()),
                "masked_fraction": 0.0,
            },
            policy_logprobs=logprobs,
        )

    def begin_save(self, directory: Path) -> FinishSave:
        self.save(directory)
        return lambda: None

    def save(self, directory: Path) -> None:
        state = {"history": self._history, "step": self._step}
        (directory / _FILE).write_text(json.dumps(state) + "\n", encoding="utf-8")

    def load(self, directory: Path) -> None:
        """Become what `save` wrote there.

        Raises:
            CorruptDataError: it is not there, or was written by another trainer.
        """
        path = directory / _FILE
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            self._history, self._step = int(state["history"]), int(state["step"])
        except (OSError, ValueError, KeyError) as error:
            raise CorruptDataError(
                f"{path}: cannot be read ({error}); was the checkpoint written with learner.trainer = arithmetic?"
            ) from error


def _next_history(history: int, step: int, groups: Sequence[TrajectoryGroup]) -> int:
    """63 bits that depend on the step, its groups in their order, and every reward."""
    data = struct.pack("<QQ", history, step)
    for group in groups:
        rewards = [trajectory.reward for trajectory in group.trajectories]
        data += group.group_id.encode() + b"\0" + struct.pack(f"<{len(rewards)}d", *rewards)
    return seed_of(data)


def _policy_logprobs(weights: ArithmeticWeights, trajectory: Trajectory) -> Float32Array:
    """[tokens in the loss]: what the law says of them under these weights."""
    temperatures, token_ids = token_temperatures(trajectory).tolist(), trajectory.token_ids.tolist()
    distributions = {
        at: arithmetic.next_distribution(weights, at, token_ids[at - 1], temperatures[at])
        for at in np.flatnonzero(trajectory.loss_mask).tolist()
    }
    return np.array([law.logprob(token_ids[at]) for at, law in distributions.items()], dtype=np.float32)
