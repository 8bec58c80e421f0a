"""Numbers that the wire can carry and no run should have: refused, or met without time or memory in their measure."""

from __future__ import annotations

import tracemalloc

import pytest

from leeway import codec
from leeway.errors import InvalidDataError
from leeway.types import Evaluation, GroupState, Purpose, SamplingParams
from leeway.v1 import replay_pb2
from replay_buffer.rules.tickets import TaskOrder
from replay_buffer.rules.transitions import EvaluationCreated
from replay_buffer.storage.index import Index
from replay_buffer.storage.index_file import Filter
from tests.harness.replay_builders import ROOT, RUN, Machine, spec


@pytest.mark.parametrize("field", ["groups_per_step", "members", "total_steps", "train_task_count", "max_attempts"])
@pytest.mark.parametrize("number", [0, (1 << 32) - 1])
def test_a_run_has_numbers_that_a_buffer_can_hold(field: str, number: int) -> None:
    message = codec.spec_to_proto(spec())
    most = (1 << 64) - 1 if field in ("total_steps", "train_task_count") else number
    setattr(message, field, number and most)
    with pytest.raises(InvalidDataError, match=field):
        codec.spec_from_proto(message)


def test_an_evaluation_has_as_well() -> None:
    request = replay_pb2.CreateEvaluationRequest(
        run=RUN,
        evaluation_id="e",
        version=codec.version_to_proto(ROOT),
        task_count=1 << 40,
        members=1,
        sampling=codec.sampling_to_proto(SamplingParams(max_tokens=1)),
    )
    with pytest.raises(InvalidDataError, match="too large"):
        codec.evaluation_from_proto(request)


@pytest.mark.parametrize("task_count", [1, 2, 3, 10, 64, 65])
def test_the_cursor_visits_every_task_once_a_tour(task_count: int) -> None:
    order = TaskOrder(7, task_count)
    tours = [[order.at(tour * task_count + at) for at in range(task_count)] for tour in range(3)]
    assert all(sorted(tour) == list(range(task_count)) for tour in tours)
    if task_count > 9:
        assert tours[0] != tours[1] != tours[2]


def test_the_order_of_many_tasks_takes_four_bytes_each() -> None:
    count = 1 << 17
    tracemalloc.start()
    order = TaskOrder(7, count)
    assert all(order.at(tour * count + count // 2) < count for tour in range(6))
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken < 2 * count * 4 * 1.1  # two tours, however many were walked


def test_a_bound_without_measure_takes_no_time() -> None:
    machine = Machine(spec(max_staleness=(1 << 32) - 1, groups_per_step=2, total_steps=3, members=1))
    assert len(machine.acquire()) == 6  # (T - h) * B


def test_an_evaluation_that_fits_no_server_takes_no_time() -> None:
    machine = Machine(spec(max_staleness=0, groups_per_step=1, members=1))
    machine.record(EvaluationCreated(Evaluation("e", ROOT, 1 << 32, 2, SamplingParams(max_tokens=1)), 1))
    assert [ticket.purpose for ticket in machine.acquire(capacity=1)] == [Purpose.TRAIN]


def test_one_call_gets_no_more_members_than_a_message_carries() -> None:
    machine = Machine(spec(max_staleness=1 << 20, groups_per_step=1 << 16, members=1))
    evaluation = Evaluation("e", ROOT, 1 << 32, 1 << 12, SamplingParams(max_tokens=1))
    request = codec.evaluation_to_proto(evaluation, 1)
    assert codec.evaluation_from_proto(request) == evaluation
    assert len(machine.acquire(max_members=(1 << 32) - 1)) == 1 << 14


def test_the_index_knows_nothing_of_steps_beyond_its_integers() -> None:
    index = Index()
    huge = (1 << 64) - 1
    assert index.batch(RUN, huge) == ()
    assert index.get(RUN, huge) is None
    assert index.oldest_replayable(RUN, huge) is None
    assert list(index.created(RUN, Filter(Purpose.TRAIN, GroupState.CONSUMED, huge))) == []
    index.close()
