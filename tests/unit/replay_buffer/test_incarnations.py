"""A learner's OpenRun counts once, however often and however late it arrives."""

from __future__ import annotations

import pytest

from leeway.errors import FencedError
from replay_buffer.lifecycle import decide_open_run
from tests.unit.replay_buffer.builders import Machine


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


def test_names_survive_a_restart() -> None:
    machine = Machine()
    opened(machine, b"one")
    refolded = machine.refolded()
    assert refolded.incarnations == machine.state.incarnations == {b"one": machine.state.epoch}


def test_a_learner_without_a_name_opens_with_each_call() -> None:
    machine = Machine()
    assert opened(machine, b"") + 1 == opened(machine, b"")
