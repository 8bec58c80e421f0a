"""What a run has in memory does not grow with its length: not with its versions, its tasks or its failures."""

from __future__ import annotations

import pytest

from leeway.errors import PreconditionError
from leeway.types import DropReason, Evaluation, GroupState, SamplingParams, TrajectoryFailure, WriteItem, WriteStatus
from replay_buffer.rules import fold
from replay_buffer.rules.dead_letters import list_dead_letters
from replay_buffer.rules.evaluation import decide_evaluation
from replay_buffer.rules.lifecycle import decide_advance, decide_commit
from replay_buffer.rules.opening import decide_open_run, decide_rollback
from replay_buffer.rules.state import RunState
from replay_buffer.rules.tickets import decide_expired
from replay_buffer.storage.stored_state import run_to_proto
from tests.harness.replay_builders import ROOT, Machine, chunk, filled, lag, snapshot, spec, version, whole

BOUND = 2
KEPT_CHECKPOINTS = 3


def machine_of(total_steps: int = 100_000) -> Machine:
    return Machine(
        spec(groups_per_step=3, members=1, max_staleness=BOUND, total_steps=total_steps, train_task_count=1 << 18)
    )


def live(machine: Machine, steps: int, lost: set[str]) -> None:
    """Tasks fail for good, others lose their servers and are given up, every version is measured."""
    state = machine.state
    for _ in range(steps):
        wanted = Evaluation(str(state.head.step), state.head, 1, 1, SamplingParams(max_tokens=16))
        machine.record(decide_evaluation(state, state.epoch, wanted))
        measured, poison, hung, *others = machine.acquire()
        machine.fill([measured])
        failure = TrajectoryFailure("the engine died of this prompt", retryable=False)
        machine.write(WriteItem(poison.members[0].trajectory_id, poison.attempt, 0, failure))
        lost.add(hung.group_id)
        machine.fill(others)
        machine.fill(machine.acquire(expired=lambda _: False))
        assert machine.draw(lambda group_id: group_id in lost) is not None
        machine.advance(lambda group_id: group_id in lost)
        machine.record(*decide_expired(state, lambda group_id: group_id in lost))
        head = state.head.step
        machine.record(decide_commit(state, state.epoch, head, max(head - KEPT_CHECKPOINTS, 0)))


def sizes(state: RunState) -> dict[str, int]:
    """Everything that has a length, and what a snapshot of it weighs."""
    lengths = {name: len(value) for name, value in vars(state).items() if hasattr(value, "__len__")}
    return {**lengths, "unended": len(state.groups.unended)}


def test_memory_does_not_grow_with_versions_tasks_or_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold, "KEPT_DEAD_LETTERS", 8)
    machine = machine_of()
    lost: set[str] = set()
    live(machine, 60, lost)
    before, weight = sizes(machine.state), run_to_proto(machine.state).ByteSize()
    live(machine, 240, lost)
    state, after = machine.state, sizes(machine.state)
    assert (state.head.step, after["dead_letters"]) == (300, 8)
    assert after["lineage"] == before["lineage"] <= KEPT_CHECKPOINTS + BOUND + 2
    # What is live differs a little from step to step.
    assert {name: size for name, size in after.items() if size > before[name] + 3} == {}
    assert run_to_proto(state).ByteSize() < weight + 1000
    assert state.dead_letter_count == state.dropped[DropReason.FAILED] > 80
    assert state.dropped[DropReason.LEASE_LOST] > 80
    assert len(list_dead_letters(state)) == state.dead_letter_count


def test_until_the_learner_says_what_it_keeps_every_version_may_be_returned_to() -> None:
    machine = machine_of()
    for _ in range(20):
        machine.step()
        machine.commit()
    assert len(machine.state.lineage) == 21
    assert decide_rollback(machine.state, version(1)) is not None


def far(steps: int = 30) -> Machine:
    """A run of so many steps, whose learner keeps the newest checkpoints."""
    machine = machine_of()
    for _ in range(steps):
        machine.step()
        head = machine.state.head.step
        machine.record(decide_commit(machine.state, machine.state.epoch, head, max(head - KEPT_CHECKPOINTS, 0)))
    return machine


def test_whatever_can_still_be_asked_for_is_answered_as_if_nothing_were_forgotten() -> None:
    machine = far()
    state, head = machine.state, machine.state.head
    assert version(1) not in state.lineage
    assert decide_advance(state, state.epoch, head, version(head.step - 1)) is None  # a repetition
    kept = version(head.step - KEPT_CHECKPOINTS)
    assert decide_rollback(state, kept) is not None
    machine.record(decide_rollback(state, kept))
    machine.reopen(kept)
    # After going back as far as possible, everything within the bound is as far away as it was.
    assert [lag(state.lineage, version(kept.step - steps)) for steps in range(BOUND + 1)] == [0, 1, 2]
    machine.step()
    assert snapshot(machine.refolded()) == snapshot(state)


def test_a_repeated_advance_is_known_although_nothing_older_than_the_head_matters() -> None:
    machine = Machine(spec(max_staleness=0))
    head = machine.state.head
    for _ in range(3):
        machine.step()
        head = machine.state.head
        machine.record(decide_commit(machine.state, machine.state.epoch, head.step, head.step))
    assert decide_advance(machine.state, machine.state.epoch, head, version(head.step - 1)) is None


def test_a_checkpoint_that_is_older_is_refused_by_name() -> None:
    machine = far()
    with pytest.raises(PreconditionError, match=r"checkpoint .* is older than anything that this run can go back to"):
        decide_open_run(machine.state, machine.spec, version(1), [])
    with pytest.raises(PreconditionError, match=r"keeps no checkpoint of step 1; roll back to step 27 or later"):
        decide_rollback(machine.state, version(1))
    with pytest.raises(PreconditionError, match=r"was never registered here"):
        decide_open_run(machine.state, machine.spec, version(31), [])


def test_a_server_that_slept_for_long_gets_no_work_and_no_error() -> None:
    assert far().acquire(version(1)) == []
    assert far().acquire(ROOT) == []
    with pytest.raises(PreconditionError, match="never registered"):
        far().acquire(version(31))


def test_tokens_of_a_forgotten_version_are_stale_and_their_task_comes_again() -> None:
    machine = far()
    old, new = machine.acquire()[:2]
    (result, *_) = machine.write(*filled(old, [version(1)]))
    assert result.status is WriteStatus.ACKNOWLEDGED
    group = machine.state.groups[old.group_id]
    assert (group.state, group.drop_reason) == (GroupState.DROPPED, DropReason.STALE)
    assert list(machine.state.requeued) == [old.task_index]
    machine.write(*whole(new.members[0], new.attempt, chunk([version(31)])))
    assert machine.state.groups[new.group_id].drop_reason is DropReason.UNKNOWN_VERSION


def test_an_evaluation_of_a_forgotten_version_keeps_its_name() -> None:
    machine = machine_of()
    state = machine.state
    first = Evaluation("held-out", state.head, 1, 1, SamplingParams(max_tokens=16))
    machine.record(decide_evaluation(state, state.epoch, first))
    machine.fill(machine.acquire(max_members=1))
    for _ in range(30):
        machine.step()
        machine.record(decide_commit(state, state.epoch, state.head.step, max(state.head.step - 1, 0)))
    assert first.version not in state.lineage
    assert decide_evaluation(state, state.epoch, first) is None
    other = Evaluation("held-out", state.head, 1, 1, SamplingParams(max_tokens=16))
    with pytest.raises(PreconditionError, match="already measures"):
        decide_evaluation(state, state.epoch, other)
