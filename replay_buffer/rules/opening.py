"""Decisions about where a run goes on from: a learner opens it, a person rolls it back, a backup is restored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

from leeway.errors import InvalidDataError, PreconditionError
from leeway.types import DropReason, GroupState, PolicyVersion, RunSpec
from replay_buffer.rules.admission import is_stale
from replay_buffer.rules.lifecycle import check_epoch, check_live
from replay_buffer.rules.state import RunState
from replay_buffer.rules.transitions import GroupsDropped, RunOpened, RunRestored, RunRolledBack

Ledger = Sequence[tuple[int, tuple[str, ...]]]


def decide_open_run(
    run: RunState | None, spec: RunSpec, checkpoint: PolicyVersion, ledger: Ledger, incarnation: bytes = b""
) -> RunOpened | None:
    """The next epoch at `checkpoint`; None when the run has already finished, or this very learner has opened it.

    Raises:
        FencedError: this learner has opened the run before, and another one since.
        PreconditionError: another specification, an unknown or abandoned checkpoint, a ledger unlike what was drawn, a
            run that a person gave up.
    """
    if run is None:
        if checkpoint != spec.root or ledger:
            raise PreconditionError(
                f"run {spec.run!r} is unknown here, but its learner resumes from {checkpoint}; "
                "is [replay_buffer] directory the one this run was started with?"
            )
        return RunOpened(spec, 1, checkpoint, incarnation)
    _check_spec(run.spec, spec)
    if run.given_up:
        check_live(run)
    if run.finished:
        return None
    if incarnation in run.incarnations:
        check_epoch(run, run.incarnations[incarnation])
        return None
    if run.must_open_at is not None and checkpoint != run.must_open_at:
        raise PreconditionError(
            f"run {spec.run!r} was rolled back to {run.must_open_at}; "
            f"resume from that checkpoint, not from {checkpoint}"
        )
    _check_checkpoint(run, checkpoint)
    _check_ledger(run, checkpoint, ledger)
    return RunOpened(spec, run.epoch + 1, checkpoint, incarnation)


def decide_after_open(run: RunState) -> list[GroupsDropped]:
    """What a newly opened run drops at once: groups too old for its head, evaluations of versions nobody serves now."""
    stale = tuple(group.group_id for group in run.occupying() if is_stale(run, group))
    left = tuple(
        group.group_id for group in run.live_evaluation.values() if run.evaluations[group.evaluation_id].closed
    )
    drops: list[GroupsDropped] = []
    if stale:
        drops.append(GroupsDropped(stale, DropReason.STALE, f"too old for version {run.head}"))
    if left:
        message = f"the run was opened at {run.head}, which its evaluation does not measure"
        drops.append(GroupsDropped(left, DropReason.ROLLED_BACK, message))
    return drops


def _check_spec(known: RunSpec, wanted: RunSpec) -> None:
    for field in fields(RunSpec):
        before, now = getattr(known, field.name), getattr(wanted, field.name)
        if before != now:
            raise PreconditionError(
                f"run {known.run!r} was first opened with {field.name} = {_show(before)}, but now {_show(now)}; "
                "restore the configuration or choose another run.name"
            )


def _show(value: object) -> str:
    return value.hex()[:16] if isinstance(value, bytes) else str(value)


def _check_checkpoint(run: RunState, checkpoint: PolicyVersion) -> None:
    name = run.spec.run
    if run.lineage.is_unknown(checkpoint) and run.restored_at is not None:
        raise PreconditionError(
            f"run {name!r}: checkpoint {checkpoint} is ahead of this log, which was restored from a backup taken at "
            f"{run.restored_at}; restore a newer backup, or remove checkpoints after step {run.restored_at.step}"
        )
    if checkpoint not in run.lineage and not run.lineage.is_unknown(checkpoint):
        raise PreconditionError(
            f"run {name!r}: checkpoint {checkpoint} is older than anything that this run can go back to; "
            f"resume from a checkpoint of step {run.committed_step} or later that {run.head} descends from"
        )
    if checkpoint not in run.lineage:
        raise PreconditionError(
            f"run {name!r}: checkpoint {checkpoint} was never registered here; "
            "is [replay_buffer] directory the one this run was started with?"
        )
    if not run.lineage.survives(checkpoint):
        raise PreconditionError(
            f"run {name!r}: checkpoint {checkpoint} belongs to an abandoned branch; "
            f"resume from one that {run.head} descends from"
        )
    if checkpoint.step < run.committed_step:
        raise PreconditionError(
            f"run {name!r}: checkpoint {checkpoint} is older than step {run.committed_step}, "
            f"whose groups are consumed for good; resume from a checkpoint of step {run.committed_step} or later"
        )


def _check_ledger(run: RunState, checkpoint: PolicyVersion, ledger: Ledger) -> None:
    name = run.spec.run
    steps: Mapping[int, tuple[str, ...]] = dict(ledger)
    if len(steps) != len(ledger):
        raise InvalidDataError(f"run {name!r}: the ledger names a step twice")
    for step in range(run.committed_step + 1, checkpoint.step + 1):
        if step not in steps:
            raise PreconditionError(
                f"run {name!r}: the ledger of checkpoint {checkpoint} lacks step {step}, which is not committed; "
                "the checkpoint is damaged: resume from another"
            )
    for step, group_ids in steps.items():
        drawn = run.batch(step)
        # What is left of a committed step whose groups are partly retired has to fit.
        is_retired = step <= run.committed_step and len(drawn) < len(group_ids) and set(drawn) <= set(group_ids)
        if step > checkpoint.step or (drawn != group_ids and not is_retired):
            raise PreconditionError(
                f"run {name!r}: step {step} of the ledger is not what was drawn for it; "
                f"checkpoint {checkpoint} does not belong to this buffer's history"
            )


def decide_rollback(run: RunState, version: PolicyVersion) -> RunRolledBack | None:
    """Return to an older version because a person said so; None when that is where the run waits already.

    Dropped are the groups of every later step, and live ones of which a later version sampled a token or is about to.

    Raises:
        PreconditionError: see ReplayService.RollbackRun.
    """
    check_live(run)
    name, lineage = run.spec.run, run.lineage
    if run.must_open_at == version:
        return None
    if version.step < run.oldest_kept_step:
        raise PreconditionError(
            f"run {name!r}: the learner keeps no checkpoint of step {version.step}; "
            f"roll back to step {run.oldest_kept_step} or later"
        )
    if version not in lineage or not lineage.survives(version):
        raise PreconditionError(
            f"run {name!r}: {run.head} does not descend from {version}; roll back to a version of the surviving history"
        )
    later_steps = range(version.step + 1, run.head.step + 1)
    batches = {step: run.batch(step) for step in later_steps}
    if missing := [step for step, group_ids in batches.items() if len(group_ids) < run.spec.groups_per_step]:
        raise PreconditionError(
            f"run {name!r}: what step {missing[0]} trained on is no longer known; "
            f"roll back to step {missing[-1]} or later"
        )
    trained = [run.groups[group_id] for group_ids in batches.values() for group_id in group_ids]
    sampled_later = [
        group
        for group in run.occupying()
        if any(known in lineage and lineage.lineage_step(known) > version.step for known in group.sampled_versions)
    ]
    measured = [
        group
        for group in run.live_evaluation.values()
        if run.evaluations[group.evaluation_id].evaluation.version != version
    ]
    dropped = [*trained, *sampled_later, *measured]
    return RunRolledBack(
        version,
        run.epoch + 1,
        tuple(group.group_id for group in dropped),
        tuple(group.task_index for group in dropped),
    )


def leap_of(now_seconds: int, noise: int) -> int:
    """How far the numbers of a restored backup leap: 2^40 at least, whatever the clock says.

    No original has handed out so many epochs or group numbers since the backup. Two restorations of one backup differ
    by their noise, and while the clock goes on the later one leaps further.

    Args:
        now_seconds: Unix time; only a hint.
        noise: random, below 2^20.
    """
    return max(now_seconds, 1 << 20) << 20 | noise


def decide_restored(run: RunState, leap: int) -> RunRestored | None:
    """Raise fences and numbers above what the original of a restored backup may have handed out; None: finished."""
    if run.finished:
        return None
    still_open = [*run.live.values(), *run.live_evaluation.values()]
    return RunRestored(
        epoch=run.epoch + leap,
        created=run.created + leap,
        group_ids=tuple(group.group_id for group in still_open if group.state is GroupState.OPEN),
    )
