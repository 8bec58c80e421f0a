"""Every transition survives the log, with each of its fields."""

from __future__ import annotations

from typing import get_args

import pytest

from leeway.errors import CorruptDataError
from leeway.types import (
    DrainReason,
    DropReason,
    Evaluation,
    Purpose,
    SamplingParams,
    Ticket,
    TicketMember,
    TrajectoryFailure,
)
from leeway.v1 import log_pb2
from replay_buffer.rules import transitions as of
from replay_buffer.storage.records import Record, decode, encode
from tests.harness.replay_builders import ROOT, chunk, close, spec, version

TICKET = Ticket("r-g1", 2, Purpose.TRAIN, 5, (TicketMember("r-g1.0", 0, 9),), SamplingParams(max_tokens=4), 1.5)
IDS = ("r-g1", "r-g2")
TRANSITIONS: list[of.Transition] = [
    of.RunOpened(spec(), 3, ROOT, b"learner"),
    of.TicketIssued(TICKET, "s0", ROOT, 6),
    of.ChunkWritten("r-g1.0", 2, 300, chunk(), (ROOT,)),
    of.TrajectoryClosed("r-g1.0", 2, close([chunk()])),
    of.TrajectoryFailed("r-g1.0", 2, TrajectoryFailure("lost", retryable=True)),
    of.GroupsDropped(IDS, DropReason.INVALID, "why"),
    of.BatchDrawn(2, 7, IDS),
    of.PolicyAdvanced(version(2), version(1), IDS),
    of.StepsCommitted(7, 3),
    of.EvaluationCreated(Evaluation("e", version(2), 4, 2, SamplingParams(max_tokens=8)), 3),
    of.RunFinished(IDS, given_up=True),
    of.RunRolledBack(version(1), 4, IDS, (3, 1)),
    of.DeadLettersRequeued(IDS, (3, 1), is_all=True),
    of.RunRestored(1 << 41, 1 << 42, IDS),
    of.ServerDrained("s0", DrainReason.DIVERGING, "odd", IDS),
    of.ServerReadmitted("s0"),
]


def survives(transition: of.Transition) -> bool:
    record = Record("a-run", 1_700_000_000_123_456_789, transition)
    return decode(b"".join(encode(record))) == record


def test_every_transition_survives() -> None:
    assert {type(transition) for transition in TRANSITIONS} == set(get_args(of.Transition))
    for transition in TRANSITIONS:
        values = [getattr(transition, name) for name in type(transition).__match_args__]
        assert all(values), f"a field of {transition} is empty, so that losing it would not show"
        assert survives(transition)


def test_an_empty_transition_is_told_from_none() -> None:
    assert survives(of.RunFinished(()))
    with pytest.raises(CorruptDataError, match="no known transition"):
        decode(log_pb2.LogRecord(run="r").SerializeToString())


def test_a_value_that_makes_no_sense_is_refused() -> None:
    wrong = log_pb2.LogRecord(run="r", server_drained=log_pb2.ServerDrained(server_id="s0"))
    with pytest.raises(CorruptDataError, match="0 is not a DrainReason"):
        decode(wrong.SerializeToString())
    with pytest.raises(CorruptDataError, match="newer Leeway"):
        decode(b"\xff\xff")
