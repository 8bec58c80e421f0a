"""A person gives a run up: everything that has not ended is dropped, and nothing goes on."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from leeway.errors import FencedError, PreconditionError
from leeway.types import DropReason, Evaluation, GroupState, SamplingParams, WriteStatus
from replay_buffer.rules.dead_letters import decide_requeue_all
from replay_buffer.rules.draw import drawn_batch
from replay_buffer.rules.evaluation import decide_evaluation, result_of
from replay_buffer.rules.lifecycle import decide_advance, decide_commit, decide_finish, decide_give_up
from replay_buffer.rules.opening import decide_open_run, decide_restored, decide_rollback
from tests.harness.replay_builders import ROOT, Machine, filled, snapshot, spec, version


def given_up() -> tuple[Machine, list[tuple[str, ...]]]:
    """A run given up with groups in every state; also the groups of its steps: two committed, one only trained."""
    machine = Machine()
    batches = [machine.step() for _ in range(3)]
    machine.commit(2)
    whole, _, *_ = machine.acquire()
    machine.fill([whole])
    drawn = machine.draw()
    assert drawn is not None
    machine.fill(machine.acquire()[:1])
    machine.record(decide_give_up(machine.state))
    return machine, batches


def test_what_has_not_ended_is_dropped_and_what_has_stays() -> None:
    machine, batches = given_up()
    state = machine.state
    assert set(machine.states()) == {GroupState.CONSUMED, GroupState.DROPPED}
    assert {state.groups[group_id].state for step in batches[:2] for group_id in step} == {GroupState.CONSUMED}
    assert {state.groups[group_id].drop_reason for group_id in batches[2]} == {DropReason.RUN_END}
    status = state.status()
    assert status.finished
    assert (status.head, status.committed_step, status.consumed) == (version(3), 2, 4)
    assert status.issued == status.consumed + status.dropped[DropReason.RUN_END]
    assert not state.groups.unended
    assert snapshot(machine.refolded()) == snapshot(state)
    assert machine.refolded().given_up


def test_it_ends_once() -> None:
    machine, _ = given_up()
    assert decide_give_up(machine.state) is None
    ended = Machine()
    ended.record(decide_finish(ended.state, 1))
    assert decide_give_up(ended.state) is None
    assert not ended.state.given_up


@pytest.mark.parametrize(
    "call",
    [
        lambda state: drawn_batch(state, 1, 4),
        lambda state: decide_advance(state, 1, version(4), version(3)),
        lambda state: decide_commit(state, 1, 3),
        lambda state: decide_evaluation(state, 1, Evaluation("e", ROOT, 1, 1, SamplingParams(max_tokens=16))),
        lambda state: decide_open_run(state, state.spec, version(3), []),
        lambda state: decide_open_run(state, state.spec, version(2), [], b"another"),
        lambda state: decide_rollback(state, version(2)),
        decide_requeue_all,
    ],
    ids=["draw", "advance", "commit", "evaluate", "open", "open at the commit", "rollback", "requeue"],
)
def test_nothing_goes_on_and_whoever_tries_is_told_why(call: Callable[..., object]) -> None:
    machine, _ = given_up()
    before = snapshot(machine.state)
    with pytest.raises(PreconditionError, match=r"\(`leeway buffer finish`\) at step 3 of 100; .* name"):
        call(machine.state)
    assert snapshot(machine.state) == before


def test_what_was_done_before_may_be_repeated() -> None:
    """A call whose answer was lost; a learner at its own end."""
    machine, _ = given_up()
    assert decide_advance(machine.state, 1, version(3), version(2)) is None
    assert decide_commit(machine.state, 1, 2) is None
    assert decide_finish(machine.state, 1) is None
    assert decide_restored(machine.state, 1000) is None


def test_writers_are_told_to_stop_and_servers_get_nothing() -> None:
    machine = Machine()
    tickets = machine.acquire()
    machine.record(decide_give_up(machine.state))
    assert {result.status for result in machine.write(*filled(tickets[0]))} == {WriteStatus.ABORTED}


def test_an_evaluation_under_way_ends_with_what_it_has() -> None:
    machine = Machine()
    wanted = Evaluation("e", ROOT, 2, 1, SamplingParams(max_tokens=16))
    machine.record(decide_evaluation(machine.state, 1, wanted))
    machine.fill(machine.acquire(max_members=1))
    machine.acquire(max_members=1)
    machine.record(decide_give_up(machine.state))
    result = result_of(machine.state, "e")
    assert (result.complete, result.rewards, result.failed) == (True, (1.0,), 1)


def test_a_run_that_waits_after_a_rollback_can_be_given_up() -> None:
    machine = Machine(spec(max_staleness=0))
    for _ in range(2):
        machine.step()
    machine.commit()
    machine.record(decide_rollback(machine.state, version(1)))
    machine.record(decide_give_up(machine.state))
    with pytest.raises(PreconditionError, match="at step 1 of 100"):
        machine.reopen(version(1))
    with pytest.raises(FencedError):
        decide_advance(machine.state, 1, version(3), version(2))
