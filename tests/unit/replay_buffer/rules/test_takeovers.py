"""Who may take a run over, and from where."""

from __future__ import annotations

import pytest

from leeway.errors import FencedError, PreconditionError
from replay_buffer.rules import fold
from replay_buffer.rules.lifecycle import decide_commit
from replay_buffer.rules.opening import decide_open_run, decide_rollback
from tests.harness.replay_builders import Machine, spec


def opened(machine: Machine, incarnation: bytes, step: int = 0) -> int:
    """Open at the head, as the learner of that name does with its checkpoint of `step`."""
    state = machine.state
    ledger = [(at, state.batches[at].group_ids) for at in range(1, step + 1) if at in state.batches]
    machine.record(decide_open_run(state, machine.spec, state.head, ledger, incarnation))
    return state.epoch


def test_a_late_repetition_does_not_take_the_run_from_its_learner() -> None:
    machine = Machine()
    epoch = opened(machine, b"one")
    machine.step()
    checkpointed = machine.state.head  # its checkpoint is on disk, its commit on the way
    assert decide_open_run(machine.state, machine.spec, machine.spec.root, [], b"one") is None
    assert (machine.state.epoch, machine.state.head) == (epoch, checkpointed)
    machine.commit(1)


def test_one_from_before_a_takeover_is_fenced() -> None:
    machine = Machine()
    opened(machine, b"one")
    machine.step()
    opened(machine, b"two", 1)
    with pytest.raises(FencedError):
        decide_open_run(machine.state, machine.spec, machine.spec.root, [], b"one")


def test_nobody_returns_to_a_checkpoint_that_its_learner_has_removed() -> None:
    machine = Machine()
    for _ in range(4):
        machine.step()
    versions = list(machine.state.lineage.ancestry(machine.state.head))
    machine.record(decide_commit(machine.state, machine.state.epoch, 4, 2))
    assert decide_rollback(machine.state, versions[2]) is not None
    with pytest.raises(PreconditionError, match="roll back to step 2 or later"):
        decide_rollback(machine.state, versions[3])


def test_what_is_issued_again_to_an_older_server_counts_by_its_earlier_deadline() -> None:
    machine = Machine(spec(max_staleness=1, groups_per_step=1, members=1))
    root = machine.spec.root
    machine.fill(machine.acquire(max_members=1))
    assert machine.draw() is not None
    machine.advance()
    (lost,) = machine.acquire(max_members=1)  # D = 2, at the head
    # Lost, and issued again to a server at the root: D = 1, as a new group would have. Only one is drawn until then.
    again = machine.acquire(root, server_id="older", expired=lambda _: True)
    assert [(ticket.group_id, ticket.attempt) for ticket in again] == [(lost.group_id, 2)]


def test_names_survive_a_restart() -> None:
    machine = Machine()
    opened(machine, b"one")
    refolded = machine.refolded()
    assert refolded.incarnations == machine.state.incarnations == {b"one": machine.state.epoch}


def test_the_names_of_the_newest_learners_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often a learner starts; one that is late by fewer starts is fenced."""
    monkeypatch.setattr(fold, "KEPT_INCARNATIONS", 8)
    machine = Machine()
    for number in range(40):
        opened(machine, b"learner %d" % number)
    assert list(machine.state.incarnations) == [b"learner %d" % number for number in range(32, 40)]
    assert machine.refolded().incarnations == machine.state.incarnations
    with pytest.raises(FencedError):
        decide_open_run(machine.state, machine.spec, machine.spec.root, [], b"learner 32")
    assert decide_open_run(machine.state, machine.spec, machine.spec.root, [], b"learner 39") is None


def test_a_learner_without_a_name_opens_with_each_call() -> None:
    machine = Machine()
    assert opened(machine, b"") + 1 == opened(machine, b"")
