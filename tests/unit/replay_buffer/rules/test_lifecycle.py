from __future__ import annotations

from dataclasses import replace

import pytest

from leeway.errors import FencedError, InvalidDataError, LeewayError, NotFoundError, PreconditionError
from leeway.types import DropReason, Evaluation, EvaluationResult, GroupState, TrajectoryFailure, WriteItem
from replay_buffer.rules.admission import is_stale
from replay_buffer.rules.draw import decide_reject, drawn_batch
from replay_buffer.rules.evaluation import decide_evaluation, result_of
from replay_buffer.rules.lifecycle import check_fit, decide_advance, decide_commit, decide_finish
from replay_buffer.rules.opening import Ledger, decide_open_run
from replay_buffer.rules.transitions import EvaluationCreated
from tests.harness.replay_builders import DATASET, ROOT, SIGNATURE, Machine, chunk, filled, spec, version, whole

# Opening


def test_the_first_open_needs_the_root_and_no_ledger() -> None:
    for checkpoint, ledger in ((version(3), []), (ROOT, [(1, ("g1",))])):
        with pytest.raises(PreconditionError, match=r"unknown here.*\[replay_buffer\] directory"):
            decide_open_run(None, spec(), checkpoint, ledger)


@pytest.mark.parametrize(
    "change",
    [
        {"groups_per_step": 3},
        {"seed": 8},
        {"dataset_digest": b"other"},
        {"signature": replace(SIGNATURE, vocab_size=65)},
        {"root": replace(ROOT, digest=b"o" * 32)},
    ],
)
def test_a_run_stays_what_it_was_first_opened_as(change: dict[str, object]) -> None:
    machine = Machine()
    field = next(iter(change))
    with pytest.raises(PreconditionError, match=rf"first opened with {field} = .* choose another run\.name"):
        decide_open_run(machine.state, replace(machine.spec, **change), ROOT, [])


def test_each_open_fences_the_epoch_before() -> None:
    machine = Machine()
    state = machine.state
    assert machine.reopen(ROOT) == 2
    refused = [
        lambda: drawn_batch(state, 1, 1),
        lambda: decide_advance(state, 1, version(1), ROOT),
        lambda: decide_commit(state, 1, 0),
        lambda: decide_reject(state, 1, "test-run-g1", ""),
        lambda: decide_finish(state, 1),
        lambda: decide_evaluation(state, 1, EVALUATION),
    ]
    for call in refused:
        with pytest.raises(FencedError, match="epoch 1 is fenced by epoch 2"):
            call()
    with pytest.raises(PreconditionError, match="epoch 3 was never allocated"):
        drawn_batch(state, 3, 1)


def test_open_commits_the_ledger_and_returns_the_rest() -> None:
    machine = Machine()
    for _ in range(3):
        machine.step()
    fourth = machine.draw()
    ledger = [(step, machine.state.batch(step)) for step in (1, 2)]
    third = machine.state.batch(3)
    machine.reopen(version(2), ledger)
    state = machine.state
    assert (state.head, state.committed_step) == (version(2), 2)
    for _, group_ids in ledger:
        assert {state.groups[group_id].state for group_id in group_ids} == {GroupState.CONSUMED}
    assert fourth is not None
    assert {state.groups[group_id].state for group_id in (*third, *fourth)} == {GroupState.READY}
    assert not state.batches
    assert [(step, state.batch(step)) for step in (1, 2)] == ledger
    # The surviving history goes on with other versions of the same steps.
    assert machine.draw() == third
    assert machine.advance() == version(3, 2)


def test_returned_groups_that_are_too_old_for_the_checkpoint_are_dropped_as_stale() -> None:
    machine = Machine(spec(max_staleness=0))
    machine.step()
    second = machine.step()
    machine.reopen(version(1), [(1, machine.state.batch(1))])
    # They came from version 1 itself, which is the head again.
    assert {machine.state.groups[group_id].state for group_id in second} == {GroupState.READY}
    assert machine.draw() == second
    machine.advance()
    third = machine.step()
    machine.reopen(version(2, 2), [(2, second)])
    assert {machine.state.groups[group_id].state for group_id in third} == {GroupState.READY}
    machine.reopen(version(2, 2))
    assert machine.state.epoch == 4


@pytest.mark.parametrize(
    ("ledger", "message"),
    [
        ([], "lacks step 1"),
        ([(1, ("test-run-g1",))], "step 1 of the ledger is not what was drawn"),
        ([(1, ("test-run-g2", "test-run-g1"))], "step 1 of the ledger is not what was drawn"),
        ([(1, ("test-run-g1", "test-run-g2")), (2, ())], "step 2 of the ledger is not what was drawn"),
    ],
)
def test_a_ledger_that_contradicts_what_was_drawn_is_refused(ledger: Ledger, message: str) -> None:
    machine = Machine()
    assert machine.step() == ("test-run-g1", "test-run-g2")
    with pytest.raises(PreconditionError, match=message):
        machine.reopen(version(1), ledger)
    assert machine.state.epoch == 1


def test_a_ledger_that_names_a_step_twice_is_refused() -> None:
    machine = Machine()
    groups = machine.step()
    with pytest.raises(InvalidDataError, match="twice"):
        machine.reopen(version(1), [(1, groups), (1, groups)])


def test_a_ledger_whose_commit_got_through_is_accepted() -> None:
    machine = Machine()
    groups = machine.step()
    machine.commit()
    machine.reopen(version(1), [(1, groups)])
    assert machine.state.committed_step == 1


def test_checkpoints_off_the_surviving_history_are_refused() -> None:
    machine = Machine()
    first = machine.step()
    machine.step()
    machine.reopen(version(1), [(1, first)])
    with pytest.raises(PreconditionError, match="abandoned branch"):
        machine.reopen(version(2))
    with pytest.raises(PreconditionError, match="never registered"):
        machine.reopen(version(2, 2))
    with pytest.raises(PreconditionError, match="older than step 1, whose groups are consumed"):
        machine.reopen(ROOT)


# Joining


@pytest.mark.parametrize(
    ("signature", "dataset", "names"),
    [
        (replace(SIGNATURE, tokenizer_digest=b"t" * 32), DATASET, "its tokenizer"),
        (replace(SIGNATURE, model_digest=b"m" * 32), DATASET, "its model differ"),
        (replace(SIGNATURE, vocab_size=65), DATASET, "its model differ"),
        (SIGNATURE, b"other", "its tasks differ"),
        (replace(SIGNATURE, tokenizer_digest=b"", model_digest=b""), b"", "tokenizer .* and model and tasks"),
    ],
)
def test_a_server_that_does_not_fit_is_told_what_differs(signature: object, dataset: bytes, names: str) -> None:
    with pytest.raises(PreconditionError, match=rf"server 's0' does not fit run 'test-run': .*{names}"):
        check_fit(Machine().state, "s0", signature, dataset)  # type: ignore[arg-type]


# Advancing, committing, finishing


def test_advance_is_idempotent_and_registers_the_head() -> None:
    machine = Machine()
    machine.step()
    assert machine.state.head == version(1)
    assert decide_advance(machine.state, 1, version(1), ROOT) is None


@pytest.mark.parametrize(
    ("new", "parent"),
    [
        (version(2), ROOT),
        (version(1, epoch=2), ROOT),
        (version(1), version(5)),
        (replace(version(1), run="other"), ROOT),
    ],
)
def test_only_the_next_version_of_the_head_may_follow(new: object, parent: object) -> None:
    machine = Machine()
    machine.fill(machine.acquire())
    machine.draw()
    with pytest.raises(PreconditionError):
        decide_advance(machine.state, 1, new, parent)  # type: ignore[arg-type]


def test_a_step_that_was_not_drawn_cannot_advance() -> None:
    with pytest.raises(PreconditionError, match="step 1 has no whole batch"):
        decide_advance(Machine().state, 1, version(1), ROOT)


def test_a_version_is_never_registered_twice() -> None:
    machine = Machine()
    machine.step()
    machine.step()
    with pytest.raises(PreconditionError):
        decide_advance(machine.state, 1, version(1), ROOT)


def test_commit_covers_every_step_up_to_its_own() -> None:
    machine = Machine()
    groups = [*machine.step(), *machine.step()]
    last = machine.step()
    machine.commit(2)
    assert {machine.state.groups[group_id].state for group_id in groups} == {GroupState.CONSUMED}
    assert {machine.state.groups[group_id].state for group_id in last} == {GroupState.DRAWN}
    assert decide_commit(machine.state, 1, 1) is None
    with pytest.raises(PreconditionError, match="step 4 cannot be committed, the head is"):
        decide_commit(machine.state, 1, 4)


def test_finish_drops_what_is_live_and_ends_everything() -> None:
    machine = Machine()
    machine.step()
    with pytest.raises(PreconditionError, match="steps 1 to 1 are trained but not committed"):
        decide_finish(machine.state, 1)
    machine.commit()
    machine.fill(machine.acquire(max_members=2))
    machine.record(EvaluationCreated(replace(EVALUATION, version=version(1)), 1))
    open_tickets = machine.acquire()
    machine.draw()
    machine.record(decide_finish(machine.state, 1))
    state = machine.state
    status = state.status()
    assert status.finished
    assert status.open == status.ready == status.drawn == 0
    assert status.issued == status.consumed + status.dropped[DropReason.RUN_END]
    assert machine.write(*filled(open_tickets[0]))[0].message.endswith("the run ended")
    assert result_of(state, "half").complete
    assert decide_finish(state, 1) is None
    assert decide_open_run(state, machine.spec, version(1), []) is None
    refused = (
        lambda: drawn_batch(state, 1, 2),
        lambda: decide_evaluation(state, 1, replace(EVALUATION, evaluation_id="x", version=version(1))),
    )
    for call in refused:
        with pytest.raises(PreconditionError, match="has finished"):
            call()


# Drawing


def test_the_oldest_deadline_is_drawn_first() -> None:
    machine = Machine(spec(max_staleness=2, groups_per_step=2))
    late, early, first = (machine.acquire(max_members=4) for _ in range(3))
    machine.fill(first)
    machine.draw()
    machine.advance()
    machine.fill(late, [version(1)])
    machine.fill(early, [ROOT])
    # `early` was issued after `late`, but its tokens are older.
    assert machine.draw() == tuple(ticket.group_id for ticket in early)


def test_the_oldest_rollout_is_waited_for_within_the_window() -> None:
    machine = Machine(spec(max_staleness=1, groups_per_step=2))
    slow, *others = machine.acquire()
    machine.fill(others)
    assert machine.draw(held) == ("test-run-g2", "test-run-g3")
    machine.advance()
    machine.write(WriteItem(slow.members[0].trajectory_id, 1, 0, chunk([version(1)])))
    machine.fill(machine.acquire())
    # Groups 4 to 6 are ready, but 5 and 6 are beyond the window that begins at group 1.
    assert machine.draw(held) is None
    assert machine.draw() == ("test-run-g4", "test-run-g5")


def test_a_group_at_its_deadline_is_waited_for_while_its_server_is_at_work() -> None:
    machine = Machine(spec(max_staleness=1, groups_per_step=2))
    *others, slow = machine.acquire()
    machine.fill(others)
    assert machine.draw(held) is not None
    machine.advance()
    machine.fill(machine.acquire())
    # Group 3 is due now and ready, group 4 is due and not ready; 5 and 6 can be taken later.
    assert machine.draw(held) is None
    machine.fill([slow], [ROOT])
    assert machine.draw(held) == ("test-run-g3", "test-run-g4")


def test_a_group_whose_first_tokens_are_young_is_not_waited_for() -> None:
    machine = Machine(spec(max_staleness=1, groups_per_step=2))
    *others, slow = machine.acquire()
    machine.fill(others)
    machine.draw(held)
    machine.advance()
    machine.fill(machine.acquire())
    machine.write(WriteItem(slow.members[0].trajectory_id, 1, 0, chunk([version(1)])))
    assert machine.draw(held) == ("test-run-g3", "test-run-g5")


def held(_: str) -> bool:
    """Every lease stands."""
    return False


def test_a_draw_is_stable_and_ready_groups_are_drawn_once() -> None:
    machine = Machine()
    machine.fill(machine.acquire())
    first = machine.draw()
    assert machine.draw() == first
    machine.advance()
    second = machine.draw()
    assert first is not None
    assert second is not None
    assert not set(first) & set(second)


@pytest.mark.parametrize("step", [0, 2, 101])
def test_only_the_next_step_can_be_drawn(step: int) -> None:
    with pytest.raises(PreconditionError, match=f"step {step} cannot be drawn"):
        drawn_batch(Machine().state, 1, step)


def test_tokens_beyond_the_bound_are_never_drawn() -> None:
    machine = Machine(spec(max_staleness=1, groups_per_step=1))
    machine.step()
    machine.step()
    # Whoever writes data older than its ticket promised finds it dropped.
    ticket = machine.acquire(version(2), 2)[0]
    machine.write(*filled(ticket, [ROOT]))
    assert machine.state.groups[ticket.group_id].drop_reason is DropReason.STALE


def test_the_draw_checks_for_itself_what_advance_should_have_dropped() -> None:
    machine = Machine(spec(max_staleness=1, groups_per_step=2))
    machine.fill(machine.acquire())
    # The head moves on and drops nothing, as a faulty version might have recorded it.
    for step in (1, 2):
        machine.state.lineage.register(version(step), machine.state.head)
    stale = list(machine.state.live)
    assert [is_stale(machine.state, machine.state.groups[group_id]) for group_id in stale] == [True] * 4
    assert machine.draw() is None


def test_a_rejected_group_is_replaced_in_its_place() -> None:
    machine = Machine(spec(groups_per_step=3))
    machine.fill(machine.acquire())
    before = machine.draw()
    assert before is not None
    machine.record(decide_reject(machine.state, 1, before[1], "not finite"))
    assert machine.state.groups[before[1]].drop_reason is DropReason.INVALID
    assert machine.state.groups[before[1]].drop_message.endswith("not finite")
    assert decide_reject(machine.state, 1, before[1], "again") is None
    with pytest.raises(PreconditionError, match="no whole batch"):
        decide_advance(machine.state, 1, version(1), ROOT)
    after = machine.draw()
    assert after is not None
    assert (after[0], after[2]) == (before[0], before[2])
    assert after[1] not in before
    machine.advance()
    with pytest.raises(PreconditionError, match="step 1 has been trained on it"):
        decide_reject(machine.state, 1, after[0], "too late")
    with pytest.raises(NotFoundError):
        decide_reject(machine.state, 1, "test-run-g99", "")


# Evaluation

EVALUATION = Evaluation("half", ROOT, task_count=3, members=2, sampling=spec().sampling)


def evaluating(evaluation: Evaluation = EVALUATION, machine: Machine | None = None) -> Machine:
    machine = machine or Machine()
    machine.record(decide_evaluation(machine.state, machine.state.epoch, evaluation))
    return machine


def test_evaluation_comes_first_and_stays_out_of_training() -> None:
    machine = evaluating()
    tickets = machine.acquire()
    assert [ticket.evaluation_id for ticket in tickets] == ["half"] * 3 + [""] * 6
    assert [ticket.task_index for ticket in tickets[:3]] == [0, 1, 2]
    assert {ticket.pinned_version for ticket in tickets[:3]} == {ROOT}
    machine.fill(tickets[:3])
    assert machine.draw() is None
    assert machine.state.status().issued == 6
    assert result_of(machine.state, "half") == EvaluationResult(True, (1.0,) * 6, 0)


def test_an_evaluation_is_only_for_servers_at_its_version() -> None:
    machine = Machine()
    machine.step()
    evaluating(EVALUATION, machine)
    assert all(not ticket.evaluation_id for ticket in machine.acquire(version(1)))
    assert [ticket.evaluation_id for ticket in machine.acquire(ROOT, 6)] == ["half"] * 3


def test_the_same_evaluation_again_is_the_same_evaluation() -> None:
    machine = evaluating()
    assert decide_evaluation(machine.state, 1, EVALUATION) is None
    with pytest.raises(PreconditionError, match="choose another id"):
        decide_evaluation(machine.state, 1, replace(EVALUATION, task_count=4))
    with pytest.raises(PreconditionError, match="never registered"):
        decide_evaluation(machine.state, 1, replace(EVALUATION, evaluation_id="x", version=version(9)))
    with pytest.raises(NotFoundError):
        result_of(machine.state, "unheard of")


def test_evaluation_seeds_do_not_depend_on_what_else_was_issued() -> None:
    alone = evaluating().acquire(max_members=2)[0]
    machine = Machine()
    machine.acquire()
    among_others = evaluating(EVALUATION, machine).acquire(max_members=2)[0]
    assert alone.group_id != among_others.group_id
    assert [member.seed for member in alone.members] == [member.seed for member in among_others.members]


def test_a_sample_of_another_version_is_repeated() -> None:
    machine = Machine()
    machine.step()
    evaluating(replace(EVALUATION, version=version(1), members=1), machine)
    ticket = machine.acquire(max_members=1)[0]
    machine.write(*whole(ticket.members[0], 1, chunk([ROOT])))
    again = machine.acquire(max_members=1)[0]
    assert (again.group_id, again.attempt) == (ticket.group_id, 2)
    machine.fill([again], [version(1)])
    assert result_of(machine.state, "half").rewards == (1.0,)


def test_failed_members_count() -> None:
    machine = evaluating()
    first, second, third = machine.acquire(max_members=6)
    machine.fill([second])
    failure = TrajectoryFailure("the verifier raised ValueError", retryable=False)
    machine.write(WriteItem(first.members[0].trajectory_id, 1, 0, failure))
    assert result_of(machine.state, "half") == EvaluationResult(False, (1.0, 1.0), 2)
    machine.write(*whole(third.members[0], 1, chunk(token_id=99)))
    assert result_of(machine.state, "half") == EvaluationResult(True, (1.0, 1.0), 4)


def test_an_evaluation_that_nobody_can_serve_any_more_ends() -> None:
    machine = Machine()
    first = machine.step()
    machine.step()
    pinned = replace(EVALUATION, version=version(2))
    evaluating(pinned, machine)
    ticket = machine.acquire(max_members=2)[0]
    machine.reopen(version(1), [(1, first)])
    assert machine.state.groups[ticket.group_id].drop_reason is DropReason.ROLLED_BACK
    assert result_of(machine.state, "half") == EvaluationResult(True, (), 6)
    # The id may be used again for the version that took the abandoned one's place.
    machine.draw()
    machine.advance()
    evaluating(replace(pinned, version=version(2, 2)), machine)
    machine.fill(machine.acquire(max_members=6))
    assert result_of(machine.state, "half").rewards == (1.0,) * 6


def test_an_evaluation_of_the_checkpoint_goes_on_after_a_restart() -> None:
    machine = Machine()
    machine.step()
    evaluating(replace(EVALUATION, version=version(1)), machine)
    machine.fill(machine.acquire(max_members=2))
    machine.reopen(version(1), [(1, machine.state.batch(1))])
    machine.fill(machine.acquire(max_members=4))
    assert result_of(machine.state, "half").complete


def test_every_refusal_is_one_line() -> None:
    machine = Machine()
    machine.step()
    for call in (
        lambda: machine.reopen(version(1)),
        lambda: drawn_batch(machine.state, 1, 7),
        lambda: decide_commit(machine.state, 1, 9),
    ):
        with pytest.raises(LeewayError) as caught:
            call()
        assert "\n" not in caught.value.message
