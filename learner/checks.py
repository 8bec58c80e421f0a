"""Refuses groups that cannot be trained on, before anything is computed. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from learner.errors import UnusableGroupError
from learner.packing import token_temperatures
from leeway.errors import InvalidDataError
from leeway.types import ModelSignature, Trajectory, TrajectoryGroup

LOGPROB_ROUNDING = 1e-4
"""How far above 0 an engine's float32 rounding may push a log-probability near 0."""


def check_group(group: TrajectoryGroup, check: Callable[[Trajectory], None]) -> None:
    """Apply a check to every member.

    Raises:
        UnusableGroupError: what the check refused, under the group's name; or the group is empty.
    """
    if not group.trajectories:
        raise UnusableGroupError(group.group_id, "has no trajectories; every member must be closed before it is drawn")
    for trajectory in group.trajectories:
        try:
            check(trajectory)
        except InvalidDataError as error:
            raise UnusableGroupError(group.group_id, error.message) from error


def check_trajectory(trajectory: Trajectory, signature: ModelSignature, longest: int | None) -> None:
    """Refuse a trajectory whose columns do not make sense for this model.

    Args:
        trajectory: as drawn.
        signature: of the model.
        longest: most tokens that can be trained on; None for the model's context.

    Raises:
        InvalidDataError: naming the trajectory and what is wrong with it.
    """
    name = f"trajectory {trajectory.trajectory_id}"
    limit = signature.context_length if longest is None else min(longest, signature.context_length)
    if not 1 <= trajectory.num_tokens <= limit:
        raise InvalidDataError(f"{name} has {trajectory.num_tokens} tokens where 1 to {limit} can be trained on")
    expected = (trajectory.num_tokens,)
    for column, values in (("behavior_logprobs", trajectory.behavior_logprobs), ("loss_mask", trajectory.loss_mask)):
        if values.shape != expected:
            raise InvalidDataError(
                f"{name}: {column} has shape {list(values.shape)} where tokens have {list(expected)}"
            )
    if int(trajectory.token_ids.min()) < 0 or int(trajectory.token_ids.max()) >= signature.vocab_size:
        raise InvalidDataError(f"{name} has token ids outside the vocabulary of {signature.vocab_size}")
    if not math.isfinite(trajectory.reward):
        raise InvalidDataError(
            f"{name} has reward {trajectory.reward}; the reward function must return a finite number"
        )
    if trajectory.loss_mask[0]:
        raise InvalidDataError(
            f"{name} has its first token in the loss, which nothing predicts; a prompt must come before it"
        )
    _check_trained_tokens(trajectory, name)


def _check_trained_tokens(trajectory: Trajectory, name: str) -> None:
    trained = trajectory.loss_mask
    behavior = trajectory.behavior_logprobs[trained]
    unusable = ~(np.isfinite(behavior) & (behavior <= LOGPROB_ROUNDING))
    if unusable.any():
        token = int(np.flatnonzero(trained)[np.argmax(unusable)])
        raise InvalidDataError(
            f"{name}: token {token} has behavior log-prob {trajectory.behavior_logprobs[token]:g}, "
            "where a finite number of at most 0 is needed; the engine must record what it sampled with"
        )
    temperatures = token_temperatures(trajectory)[trained]
    if not (np.isfinite(temperatures) & (temperatures > 0)).all():
        raise InvalidDataError(
            f"{name} was sampled at temperature {temperatures.min()}; only positive ones can be trained on"
        )
