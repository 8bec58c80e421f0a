"""The draw: which groups a step trains on.

    READY groups inside the window ── earliest deadline first ──> batch of step h + 1, checked against the head h

A long rollout is waited for, within bounds, as long as a server samples it; otherwise shorter ones would always
overtake it:

    due       for every k >= h, a batch that takes a group with D > k leaves at most (k - h) * B groups with D <= k
              being sampled: the steps until k can take no more (k = h: no group at its deadline is overtaken)
    window    groups that were issued (S + 1) * B or more after the oldest one being sampled wait for it

Admission let no more in than the steps can take, and a draw keeps it so: while servers live and the learner does not
start over, nothing that is sampled gets too old. Both bounds end with the rollout's lease, so a dead server holds
nothing up for longer.
"""

from __future__ import annotations

from typing import NamedTuple

from leeway.errors import NotFoundError, PreconditionError
from leeway.types import DropReason, GroupState, Purpose
from replay_buffer.rules.admission import deadline
from replay_buffer.rules.groups import DrawnBatch, Group
from replay_buffer.rules.lifecycle import check_epoch, check_live
from replay_buffer.rules.state import RunState
from replay_buffer.rules.tickets import Expired
from replay_buffer.rules.transitions import BatchDrawn, GroupsDropped


def drawn_batch(run: RunState, epoch: int, step: int) -> DrawnBatch | None:
    """The step's batch, when it has one that is whole.

    Raises:
        FencedError: a newer learner has opened the run.
        PreconditionError: the step is not the one after the head, or the run has finished.
    """
    check_epoch(run, epoch)
    check_live(run)
    if step != run.head.step + 1 or step > run.spec.total_steps:
        raise PreconditionError(
            f"run {run.spec.run!r}: step {step} cannot be drawn; the head is {run.head} of {run.spec.total_steps} steps"
        )
    batch = run.batches.get(step)
    if batch is None or any(group_id not in run.live for group_id in batch.group_ids):
        return None
    return batch


def decide_draw(run: RunState, epoch: int, step: int, expired: Expired) -> BatchDrawn | None:
    """A batch for a step that has none, or one in place of one that lost groups; None while groups are missing."""
    batch = run.batches.get(step)
    # What is left of an earlier draw keeps its place, so that the other ranks' slices stand.
    kept = batch.group_ids if batch is not None else ()
    places = [group_id if group_id in run.live else None for group_id in kept] or ([None] * run.spec.groups_per_step)
    wanted = places.count(None)
    being_sampled = [group for group in run.live.values() if _is_being_sampled(group, expired)]
    chosen = _ready(run, being_sampled)[:wanted]
    if len(chosen) < wanted:
        return None
    if _overtakes(run, chosen[-1].deadline, being_sampled):
        return None
    refill = iter(chosen)
    return BatchDrawn(
        epoch, step, tuple(place if place is not None else next(refill).group.group_id for place in places)
    )


class _Due(NamedTuple):
    deadline: int
    number: int  # in the order of issue
    group: Group


def _ready(run: RunState, being_sampled: list[Group]) -> list[_Due]:
    """The groups that may be drawn at the head, in the order in which they should be."""
    window = (run.spec.max_staleness + 1) * run.spec.groups_per_step
    end = being_sampled[0].number + window if being_sampled else None
    due = [
        _Due(deadline(run, group), group.number, group)
        for group in run.live.values()
        if group.state is GroupState.READY and (end is None or group.number < end)
    ]
    due.sort(key=lambda entry: entry[:2])
    return [entry for entry in due if entry.deadline >= run.head.step]


def _overtakes(run: RunState, latest_deadline: int, being_sampled: list[Group]) -> bool:
    """Whether a batch up to this deadline would leave more being sampled than the steps after it can take in time."""
    head_step, per_step = run.head.step, run.spec.groups_per_step
    due = sorted(at for group in being_sampled if head_step <= (at := deadline(run, group)) < latest_deadline)
    return any(count > (at - head_step) * per_step for count, at in enumerate(due, start=1))


def _is_being_sampled(group: Group, expired: Expired) -> bool:
    return group.state is GroupState.OPEN and group.being_sampled and not expired(group.group_id)


def decide_reject(run: RunState, epoch: int, group_id: str, message: str) -> GroupsDropped | None:
    """Set a group aside that the learner cannot use; None when it has been.

    Raises:
        FencedError: a newer learner has opened the run.
        NotFoundError: no such group.
        PreconditionError: it is part of a trained step.
    """
    check_epoch(run, epoch)
    group = run.groups.get(group_id)
    if group is None or group.purpose is not Purpose.TRAIN:
        raise NotFoundError(f"run {run.spec.run!r} has no training group {group_id!r}")
    if group.state is GroupState.DROPPED:
        return None
    if group.state is GroupState.CONSUMED or (group.state is GroupState.DRAWN and run.batches[group.step].sealed):
        raise PreconditionError(f"group {group_id} cannot be set aside: step {group.step} has been trained on it")
    return GroupsDropped((group_id,), DropReason.INVALID, f"the learner cannot use it: {message}")
