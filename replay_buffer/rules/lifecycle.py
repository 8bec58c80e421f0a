"""Decisions about an open run: advancing, committing, finishing, and which callers may do so."""

from __future__ import annotations

from leeway.errors import FencedError, PreconditionError
from leeway.types import GroupState, ModelSignature, PolicyVersion
from replay_buffer.rules.admission import deadline_of
from replay_buffer.rules.state import RunState
from replay_buffer.rules.tickets import Expired
from replay_buffer.rules.transitions import (
    PolicyAdvanced,
    RunFinished,
    StepsCommitted,
)


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
    if run.given_up:
        raise PreconditionError(
            f"run {run.spec.run!r} was ended permanently (`leeway buffer finish`) at step {run.head.step} of "
            f"{run.spec.total_steps}; it cannot go on: start a run with another name"
        )
    if run.finished:
        raise PreconditionError(f"run {run.spec.run!r} has finished; start a run with another name")


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

    What becomes too old is dropped with it as stale, except a group whose lease ran out: `decide_expired` comes next.

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
        and not (group.state is GroupState.OPEN and group.being_sampled and expired(group.group_id))
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
    check_live(run)
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


def decide_give_up(run: RunState) -> RunFinished | None:
    """End the run because a person gives it up; None when it has ended.

    Also dropped is what was trained and never committed: no checkpoint is known that says so.
    """
    if run.finished:
        return None
    return RunFinished(tuple(run.groups.unended), given_up=True)
