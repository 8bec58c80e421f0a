"""Decisions about a run as a whole: opening, advancing, committing, finishing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

from leeway.errors import FencedError, InvalidDataError, PreconditionError
from leeway.types import DropReason, GroupState, ModelSignature, PolicyVersion, RunSpec
from replay_buffer.rules.admission import deadline_of, is_stale
from replay_buffer.rules.state import RunState
from replay_buffer.rules.tickets import Expired
from replay_buffer.rules.transitions import (
    GroupsDropped,
    PolicyAdvanced,
    RunFinished,
    RunOpened,
    RunRestored,
    RunRolledBack,
    StepsCommitted,
)

Ledger = Sequence[tuple[int, tuple[str, ...]]]


def check_epoch(run: RunState, epoch: int) -> None:
    """Only the newest incarnation of the learner may go on.

    Raises:
        FencedError: a newer one has opened the run.
        PreconditionError: the epoch was never allocated.
    """
    name = run.spec.run
    if epoch < run.epoch:
        cause = "another learner has taken over" if run.must_open_at is None else "the run was rolled back"
        raise FencedError(f"run {name!r}: epoch {epoch} is fenced by epoch {run.epoch}; {cause}")
    if epoch > run.epoch or run.must_open_at is not None:  # the epoch of a rollback is nobody's
        raise PreconditionError(f"run {name!r}: epoch {epoch} was never allocated; call OpenRun")


def check_live(run: RunState) -> None:
    """Refuse what makes no sense in a finished run.

    Raises:
        PreconditionError: it has finished.
    """
    if run.finished:
        raise PreconditionError(f"run {run.spec.run!r} has finished; start a run with another name")


def decide_open_run(
    run: RunState | None, spec: RunSpec, checkpoint: PolicyVersion, ledger: Ledger, incarnation: bytes = b""
) -> RunOpened | None:
    """The next epoch at `checkpoint`; None when the run has already finished, or this very learner has opened it.

    Raises:
        FencedError: this learner has opened the run before, and another one since.
        PreconditionError: another specification, an unknown or abandoned checkpoint, a ledger unlike what was drawn.
    """
    if run is None:
        if checkpoint != spec.root or ledger:
            raise PreconditionError(
                f"run {spec.run!r} is unknown here, but its learner resumes from {checkpoint}; "
                "is [replay_buffer] directory the one this run was started with?"
            )
        return RunOpened(spec, 1, checkpoint, incarnation)
    _check_spec(run.spec, spec)
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


def _check_spec(known: RunSpec, asked: RunSpec) -> None:
    for field in fields(RunSpec):
        before, now = getattr(known, field.name), getattr(asked, field.name)
        if before != now:
            raise PreconditionError(
                f"run {known.run!r} was first opened with {field.name} = {_show(before)}, but now {_show(now)}; "
                "restore the configuration or choose another run.name"
            )


def _show(value: object) -> str:
    return value.hex()[:16] if isinstance(value, bytes) else str(value)


def _check_checkpoint(run: RunState, checkpoint: PolicyVersion) -> None:
    name = run.spec.run
    if checkpoint not in run.lineage and run.restored_at is not None:
        raise PreconditionError(
            f"run {name!r}: checkpoint {checkpoint} is ahead of this log, which was restored from a backup taken at "
            f"{run.restored_at}; restore a newer backup, or remove checkpoints after step {run.restored_at.step}"
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
    if version not in lineage or not lineage.survives(version):
        raise PreconditionError(
            f"run {name!r}: {run.head} does not descend from {version}; roll back to a version of the surviving history"
        )
    if version.step < run.oldest_kept_step:
        raise PreconditionError(
            f"run {name!r}: the learner keeps no checkpoint of step {version.step}; "
            f"roll back to step {run.oldest_kept_step} or later"
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


def decide_restored(run: RunState, now_seconds: int) -> RunRestored | None:
    """Raise fences and numbers above what the original of a restored backup may have handed out; None: finished.

    The time only makes numbers that nobody has: seconds since 1970 are above any count of incarnations and groups, and
    above those of an earlier restoration of the same backup.
    """
    if run.finished:
        return None
    still_open = [*run.live.values(), *run.live_evaluation.values()]
    return RunRestored(
        epoch=max(run.epoch + 1, now_seconds),
        created=max(run.created, now_seconds),
        group_ids=tuple(group.group_id for group in still_open if group.state is GroupState.OPEN),
    )


def check_fit(run: RunState, server_id: str, signature: ModelSignature, dataset_digest: bytes) -> None:
    """Check that a server suits a run.

    Raises:
        PreconditionError: naming everything that differs.
    """
    wanted = run.spec.signature
    differing: list[str] = []
    if signature.tokenizer_digest != wanted.tokenizer_digest:
        differing.append("tokenizer (or chat template)")
    shape = ("model_digest", "vocab_size", "moe_layers", "experts", "experts_per_token", "context_length")
    if any(getattr(signature, name) != getattr(wanted, name) for name in shape):
        differing.append("model")
    if dataset_digest != run.spec.dataset_digest:
        differing.append("tasks")
    if differing:
        raise PreconditionError(
            f"server {server_id!r} does not fit run {run.spec.run!r}: its {' and '.join(differing)} "
            "differ from the learner's; start both from the same configuration"
        )


def decide_advance(
    run: RunState, epoch: int, version: PolicyVersion, parent: PolicyVersion, expired: Expired = lambda _: False
) -> PolicyAdvanced | None:
    """Seal the batch of `version.step`; None when that has already happened.

    What becomes too old is dropped with it as stale, except what its server has left: `decide_expired` comes next.

    Raises:
        FencedError, PreconditionError: see ReplayService.Advance.
    """
    check_epoch(run, epoch)
    name, head = run.spec.run, run.head
    if version == head and run.lineage.parent(version) == parent:
        return None
    check_live(run)
    if parent != head:
        raise PreconditionError(f"run {name!r}: {version} was trained from {parent}, but the head is {head}")
    if (version.run, version.epoch, version.step) != (name, epoch, head.step + 1):
        raise PreconditionError(
            f"run {name!r}: epoch {epoch} goes from {head} to step {head.step + 1}, not to {version}"
        )
    batch = run.batches.get(version.step)
    if batch is None or any(group_id not in run.live for group_id in batch.group_ids):
        raise PreconditionError(f"run {name!r}: step {version.step} has no whole batch; draw it (again) first")
    bound, in_batch = run.spec.max_staleness, set(batch.group_ids)
    stale = tuple(
        group.group_id
        for group in run.occupying()
        # With bound 0 only the new head itself will do, and nothing has been sampled from it.
        if group.group_id not in in_batch
        and (bound == 0 or deadline_of(run, group.sampled_versions) < version.step)
        and not (group.state is GroupState.OPEN and group.at_work and expired(group.group_id))
    )
    return PolicyAdvanced(version, parent, stale)


def decide_commit(run: RunState, epoch: int, step: int, oldest_kept_step: int = 0) -> StepsCommitted | None:
    """Consume every step up to `step`, keep what the oldest checkpoint needs; None when that has already happened.

    Raises:
        FencedError, PreconditionError: see ReplayService.Commit.
    """
    check_epoch(run, epoch)
    if oldest_kept_step > step:
        raise PreconditionError(
            f"run {run.spec.run!r}: the oldest kept checkpoint cannot be of step {oldest_kept_step} "
            f"when step {step} is committed"
        )
    if step <= run.committed_step:
        return None
    if step > run.head.step:
        raise PreconditionError(f"run {run.spec.run!r}: step {step} cannot be committed, the head is {run.head}")
    return StepsCommitted(step, oldest_kept_step)


def decide_finish(run: RunState, epoch: int) -> RunFinished | None:
    """End the run; None when it has ended.

    Raises:
        FencedError: a newer learner has taken over.
        PreconditionError: trained steps are not committed, so their groups could not be told consumed from dropped.
    """
    check_epoch(run, epoch)
    if run.finished:
        return None
    if run.committed_step < run.head.step:
        raise PreconditionError(
            f"run {run.spec.run!r}: steps {run.committed_step + 1} to {run.head.step} are trained but not committed; "
            "write a checkpoint and commit it before FinishRun"
        )
    return RunFinished(tuple(group.group_id for group in run.unended()))
