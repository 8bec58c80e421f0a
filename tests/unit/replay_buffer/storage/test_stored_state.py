"""A snapshot holds everything that a state consists of."""

from __future__ import annotations

from leeway.types import DrainReason, Evaluation, SamplingParams, TrajectoryFailure, WriteItem
from leeway.v1.storage_pb2 import RunSnapshot
from replay_buffer.rules.drain import decide_drain
from replay_buffer.rules.evaluation import decide_evaluation
from replay_buffer.rules.fold import apply
from replay_buffer.rules.groups import DrawnBatch, Group
from replay_buffer.rules.lifecycle import decide_commit
from replay_buffer.rules.lineage import Lineage
from replay_buffer.rules.opening import decide_restored, decide_rollback
from replay_buffer.rules.state import RunState
from replay_buffer.storage.index import Index
from replay_buffer.storage.run_index import RunIndex
from replay_buffer.storage.segments import Location, Position
from replay_buffer.storage.stored_state import group_from_proto, group_to_proto, run_from_proto, run_to_proto
from tests.harness.replay_builders import RUN, Machine, chunk, described, lag, spec, whole


def restored(state: RunState) -> RunState:
    return run_from_proto(RunSnapshot.FromString(run_to_proto(state).SerializeToString()), state.ended)


def rich_state() -> RunState:
    """A run in which nothing is as it was at first."""
    machine = Machine(spec(max_staleness=3, members=2, max_attempts=3))
    state = machine.state
    for _ in range(3):
        machine.step()
    machine.record(decide_commit(state, state.epoch, 2, 1))
    machine.record(decide_rollback(state, next(v for v in state.lineage if v.step == 2)))
    machine.reopen(state.head)
    machine.record(decide_restored(state, 1000))
    machine.reopen(state.head)
    failed, half, *_ = machine.acquire()
    failure = TrajectoryFailure("too long", retryable=False)
    machine.write(WriteItem(failed.members[0].trajectory_id, 1, 0, failure))
    machine.write(*whole(half.members[0], half.attempt, chunk([state.head])))
    machine.write(WriteItem(half.members[1].trajectory_id, half.attempt, 0, chunk([state.head])))
    for evaluation_id, task_count in (("over", 1), ("under way", 2)):
        wanted = Evaluation(evaluation_id, state.head, task_count, 1, SamplingParams(max_tokens=16))
        machine.record(decide_evaluation(state, state.epoch, wanted))
        machine.fill(machine.acquire(max_members=1))
    machine.acquire(max_members=1)
    state.batches |= {7: DrawnBatch(7, ("a", "b"), sealed=True), 8: DrawnBatch(8, ("c", "d"))}
    state.lost_attempts[3] = 2
    state.incarnations[b"learner"] = 4
    machine.record(
        decide_drain(state, "s9", DrainReason.DIVERGING, "odd", epoch=state.epoch, others_active={"s0"}, force=False)
    )
    state.requeued.extend([4, 1])
    state.finished = state.given_up = True
    return state


def test_a_snapshot_holds_everything() -> None:
    state = rich_state()
    # A new field has to be set by `rich_state`, and to be part of the snapshot.
    assert not {name for name, value in vars(state).items() if not value}
    assert state.lineage._discarded
    assert state.rollback is not None
    assert {batch.sealed for batch in state.batches.values()} == {True, False}
    assert {evaluation.ended for evaluation in state.evaluations.values()} == {True, False}
    assert described(restored(state)) == described(state)


def test_a_snapshot_holds_groups_to_the_last_slot() -> None:
    state = rich_state()
    group = state.groups.unended[next(iter(state.groups.unended))]
    for number, name in enumerate(Group.__slots__):
        if name not in ("group_id", "members", "purpose", "state", "drop_reason"):
            value = getattr(group, name)
            filled = f"{name}" if isinstance(value, str) else value or number
            setattr(group, name, filled)
    group.requeued = True
    group.version, group.ended_at = state.head, Location(1, 2, 3).handle
    for member in group.members:
        member.attempt, member.server_id, member.reward, member.versions = 7, "s7", 0.5, (state.head,)
        member.records.append(Location(5, (1 << 32) - 1, (1 << 32) - 1).handle)
    for each in (group, *group.members):
        assert all(getattr(each, name) for name in type(each).__slots__ if name != "drop_reason")
    assert described(group_from_proto(group_to_proto(group))) == described(group)


def test_versions_keep_their_tree() -> None:
    state = rich_state()
    copy = restored(state).lineage
    assert isinstance(copy, Lineage)
    assert [lag(copy, version) for version in state.lineage] == [
        lag(state.lineage, version) for version in state.lineage
    ]
    assert [copy.parent(version) for version in copy] == [state.lineage.parent(version) for version in state.lineage]


def test_a_late_record_of_an_ended_group_is_folded_once() -> None:
    """Its group was dropped before a snapshot, the index has seen the record, the restart folds it again."""
    machine = Machine()
    (ticket, *_) = machine.acquire()
    member = ticket.members[0]
    machine.write(*whole(member, 1, chunk(logprob=float("nan"))))
    group = machine.state.groups[ticket.group_id]
    assert group.ended
    records = list(group.members[0].records)
    assert len(records) == 2
    last = len(machine.records) - 1
    assert machine.read(Location(1, last, 0).handle).__class__.__name__ == "TrajectoryFailed"
    copy = restored(machine.state)
    apply(copy, machine.read(Location(1, last, 0).handle), 0, records[-1])
    again = copy.groups[ticket.group_id]
    assert list(again.members[0].records) == records


def test_the_index_forgets_what_will_be_folded_again() -> None:
    machine = Machine()
    machine.step()
    machine.commit()
    index = Index()
    ended = RunIndex(index, RUN)
    for group in machine.state.ended.groups():
        ended.put(group)
    record = next(iter(machine.state.ended.groups())).ended_at
    assert record is not None
    consumed_at = Location.of(record)
    index.settle(b"g", Position(1, consumed_at.offset + 1))
    index.forget_from(Position(1, consumed_at.offset))
    assert list(ended.groups()) == []
