"""A crash between a close and the drop that goes with it changes nothing: the restart drops what should be dropped."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from leeway.types import DropReason
from replay_buffer.rules.completion import decide_after_restart
from tests.harness.replay_builders import ROOT, Machine, filled, spec, version


def without_last_record(machine: Machine) -> Machine:
    """The run as it is when the crash kept everything but the last record."""
    machine.records.pop()
    machine.state = machine.refolded()
    return machine


def no_signal(machine: Machine) -> None:
    machine.fill(machine.acquire(max_members=2))


def stale(machine: Machine) -> None:
    machine.step()
    (ticket,) = machine.acquire(max_members=2)
    machine.write(*filled(ticket, [ROOT]))


def unknown_version(machine: Machine) -> None:
    (ticket,) = machine.acquire(max_members=2)
    machine.write(*filled(ticket, [version(99)]))


@pytest.mark.parametrize(
    ("happen", "reason", "drop_no_signal"),
    [
        (no_signal, DropReason.NO_SIGNAL, True),
        (stale, DropReason.STALE, False),
        (unknown_version, DropReason.UNKNOWN_VERSION, False),
    ],
)
def test_a_restart_finishes_what_a_crash_cut_in_two(
    happen: Callable[[Machine], None], reason: DropReason, drop_no_signal: bool
) -> None:
    machine = Machine(spec(max_staleness=0, drop_no_signal=drop_no_signal))
    happen(machine)
    assert machine.state.dropped == {reason: 1}
    without_last_record(machine)
    assert machine.state.dropped == {}
    machine.record(*decide_after_restart(machine.state))
    assert machine.state.dropped == {reason: 1}
    assert decide_after_restart(machine.state) == []


def test_a_whole_run_has_nothing_to_settle() -> None:
    machine = Machine(spec(max_staleness=1))
    machine.fill(machine.acquire())
    machine.draw()
    assert decide_after_restart(machine.state) == []
