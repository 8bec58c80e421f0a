"""Refuses groups that this model or its loss cannot be trained on, before anything is computed. Needs no torch.

That a trajectory is whole and its log-probs are usable was judged when it was assembled (`leeway.trajectory`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from learner.trainer import UnusableGroupError
from leeway.errors import InvalidDataError
from leeway.trajectory.check import LARGEST_LOGPROB, LARGEST_MASS
from leeway.types import ModelSignature, Trajectory, TrajectoryGroup


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
    """Refuse a trajectory that this model cannot be trained on.

    Args:
        trajectory: as drawn, so that its columns fit together (`leeway.trajectory`).
        signature: of the model.
        longest: most tokens that can be trained on; None for the model's context.

    Raises:
        InvalidDataError: naming the trajectory and what is wrong with it.
    """
    name = f"trajectory {trajectory.trajectory_id}"
    limit = signature.context_length if longest is None else min(longest, signature.context_length)
    if not 1 <= trajectory.num_tokens <= limit:
        raise InvalidDataError(f"{name} has {trajectory.num_tokens} tokens where 1 to {limit} can be trained on")
    if int(trajectory.token_ids.min()) < 0 or int(trajectory.token_ids.max()) >= signature.vocab_size:
        raise InvalidDataError(f"{name} has token ids outside the vocabulary of {signature.vocab_size}")
    if trajectory.loss_mask[0]:
        raise InvalidDataError(
            f"{name} has its first token in the loss, which nothing predicts; a prompt must come before it"
        )


def check_candidates(trajectory: Trajectory, signature: ModelSignature, topk: int) -> None:
    """Refuse recorded candidates that a top-K loss cannot use.

    Args:
        trajectory: as drawn.
        signature: of the model.
        topk: K of the loss.

    Raises:
        InvalidDataError: missing, fewer than K, shapes that disagree, or not K different tokens with log-probs.
    """
    name = f"trajectory {trajectory.trajectory_id}"
    token_ids, logprobs = trajectory.topk_token_ids, trajectory.topk_logprobs
    if token_ids is None or logprobs is None:
        raise InvalidDataError(
            f"{name} has no recorded candidates; set sampling.topk = {topk}, or choose an algorithm without top-K"
        )
    if token_ids.ndim != 2 or token_ids.shape != logprobs.shape or token_ids.shape[0] != trajectory.num_tokens:
        raise InvalidDataError(
            f"{name}: candidates have shapes {list(token_ids.shape)} (ids) and {list(logprobs.shape)} (log-probs) "
            f"where both are [{trajectory.num_tokens}, K]"
        )
    if token_ids.shape[1] < topk:
        raise InvalidDataError(
            f"{name} has {token_ids.shape[1]} recorded candidates per token where the loss takes {topk}; "
            f"set sampling.topk = {topk}, or learner.training.topk = {token_ids.shape[1]}"
        )
    trained = np.flatnonzero(trajectory.loss_mask)
    token_ids, logprobs = token_ids[trained], logprobs[trained]
    ordered = np.sort(token_ids, axis=-1)
    faults = {
        "a candidate outside the vocabulary": ((token_ids < 0) | (token_ids >= signature.vocab_size)).any(axis=-1),
        "the same candidate twice": (ordered[:, 1:] == ordered[:, :-1]).any(axis=-1),
        "a candidate whose log-prob is not a finite number of at most 0": ~(
            np.isfinite(logprobs) & (logprobs <= LARGEST_LOGPROB)
        ).all(axis=-1),
        "candidates of more than all probability": np.exp(logprobs.astype(np.float64)).sum(axis=-1) > LARGEST_MASS,
    }
    for fault, tokens in faults.items():
        if tokens.any():
            token = int(trained[np.argmax(tokens)])
            raise InvalidDataError(f"{name}: token {token} has {fault}; the engine must record what it sampled from")


def check_routing(trajectory: Trajectory, signature: ModelSignature) -> None:
    """Refuse routing that this model cannot have produced.

    Args:
        trajectory: routing [n - 1, L, k].
        signature: of the model, an MoE.

    Raises:
        InvalidDataError: missing, of another shape, an expert that does not exist, an expert twice for one token.
    """
    name = f"trajectory {trajectory.trajectory_id}"
    routing = trajectory.routing
    if routing is None:
        raise InvalidDataError(
            f"{name} has no routing; set sampling.routing = true or learner.training.routing_replay = false"
        )
    expected = (trajectory.num_tokens - 1, signature.moe_layers, signature.experts_per_token)
    if routing.shape != expected:
        raise InvalidDataError(
            f"{name} has routing of shape {list(routing.shape)} where [tokens - 1, layers, k] is {list(expected)}; "
            "it was recorded with another model, or rows are missing"
        )
    if routing.size == 0:
        return
    outside = (routing < 0) | (routing >= signature.experts)
    if outside.any():
        token, layer, slot = (int(place) for place in np.argwhere(outside)[0])
        raise InvalidDataError(
            f"{name}: token {token} was routed to expert {int(routing[token, layer, slot])} of a model with "
            f"{signature.experts} in MoE layer {layer}; it was recorded with another model"
        )
    ordered = np.sort(routing, axis=-1)
    repeated = (ordered[..., 1:] == ordered[..., :-1]).any(axis=-1)
    if repeated.any():
        token, layer = (int(place) for place in np.argwhere(repeated)[0])
        raise InvalidDataError(
            f"{name}: token {token} names an expert twice in MoE layer {layer}; its routing was not fully recorded"
        )
