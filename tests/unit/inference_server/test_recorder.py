"""What a recorder writes of an engine's chunks: the same trajectory, whether routing is packed or not."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np
import pytest

from inference_server.engine import GenerationEnd
from inference_server.rollout.trajectory_recorder import TrajectoryRecorder
from leeway import codec
from leeway.trajectory.assembly import assemble_trajectory
from leeway.types import (
    Array,
    Column,
    ColumnKind,
    FinishReason,
    PolicyVersion,
    Purpose,
    SamplingParams,
    Ticket,
    TicketMember,
    Trajectory,
    TrajectoryChunk,
    TrajectoryClose,
    TrajectoryRecord,
    VersionSpan,
)
from leeway.v1 import common_pb2, trajectory_pb2

PROMPT, TOKENS, PER_CHUNK, LAYERS, K = 4, 204, 10, 3, 2
MOMENT = datetime(2026, 1, 1, tzinfo=UTC)
VERSION = PolicyVersion("demo", 1, 1, bytes(32))
TICKET = Ticket("g", 1, Purpose.TRAIN, 0, (TicketMember("g.0", 0, 7),), SamplingParams(max_tokens=500), 30.0)
ROUTING: Array = np.random.default_rng(0).integers(0, 8, (TOKENS - 1, LAYERS, K), dtype=np.uint8)


def engine_chunks(late: bool) -> list[TrajectoryChunk]:
    """Tokens in pieces, their routing beside them or all at the end."""
    chunks: list[TrajectoryChunk] = []
    for begin in range(PROMPT, TOKENS, PER_CHUNK):
        end = begin + PER_CHUNK
        first, last = (0 if begin == PROMPT else begin - 1), end - 1
        columns = [
            Column(ColumnKind.TOKEN_IDS, begin, end, np.arange(begin, end, dtype=np.int32)),
            Column(ColumnKind.BEHAVIOR_LOGPROBS, begin, end, np.full(PER_CHUNK, -1.0, np.float32)),
        ]
        if not late:
            columns.append(Column(ColumnKind.ROUTING, first, last, ROUTING[first:last]))
        chunks.append(TrajectoryChunk(tuple(columns), version_spans=(VersionSpan(begin, end, VERSION),)))
    if late:
        chunks.append(TrajectoryChunk((Column(ColumnKind.ROUTING, 0, TOKENS - 1, ROUTING),)))
    return chunks


def written(chunks: Sequence[TrajectoryChunk], routing_rows: int) -> tuple[list[bytes], Trajectory]:
    recorder = TrajectoryRecorder(TICKET, TICKET.members[0], np.arange(PROMPT, dtype=np.int32), "e/1", routing_rows)
    data: list[bytes] = []
    for chunk in chunks:
        item = recorder.chunk(chunk)
        assert isinstance(item.content, bytes)
        data.append(item.content)
        recorder.written()
    rest = recorder.rest()
    if rest is not None:
        assert isinstance(rest.content, bytes)
        assert rest.seq == len(data)
        data.append(rest.content)
        recorder.written()
    assert recorder.rest() is None
    end = GenerationEnd(FinishReason.LENGTH, TOKENS - PROMPT, MOMENT, MOMENT)
    close = recorder.close(end, 1.0).content
    assert isinstance(close, TrajectoryClose)
    return data, assemble_trajectory(TrajectoryRecord("g.0", 0, 1, "s", close, "", tuple(data)))


def routing_columns(data: Sequence[bytes]) -> list[common_pb2.Column]:
    messages = [codec.parse(trajectory_pb2.TrajectoryChunk, chunk) for chunk in data]
    return [column for message in messages for column in message.columns if column.kind == ColumnKind.ROUTING]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("routing_rows", "columns"), [(100, 2), (4096, 1)])
def test_routing_is_held_back_and_packed(late: bool, routing_rows: int, columns: int) -> None:
    data, trajectory = written(engine_chunks(late), routing_rows)
    np.testing.assert_array_equal(trajectory.routing, ROUTING)
    found = routing_columns(data)
    assert len(found) == (1 if late else columns)
    assert found[0].encoding == common_pb2.COLUMN_ENCODING_PACKED_ROUTING


@pytest.mark.parametrize("late", [False, True])
def test_without_rows_to_wait_for_routing_is_plain_and_goes_as_it_comes(late: bool) -> None:
    chunks = engine_chunks(late)
    data, trajectory = written(chunks, 0)
    np.testing.assert_array_equal(trajectory.routing, ROUTING)
    assert len(data) == len(chunks)
    assert not any(column.encoding for column in routing_columns(data))


def test_routing_with_a_gap_stays_apart() -> None:
    chunks = engine_chunks(late=False)
    del chunks[3]
    recorder = TrajectoryRecorder(TICKET, TICKET.members[0], np.arange(PROMPT, dtype=np.int32), "e/1", 4096)
    for chunk in chunks[:3]:
        recorder.chunk(chunk)
    recorder.chunk(TrajectoryChunk((Column(ColumnKind.ROUTING, 50, 60, ROUTING[50:60]),)))
    rest = recorder.rest()
    assert rest is not None
    assert isinstance(rest.content, bytes)
    assert [(column.start_token, column.end_token) for column in routing_columns([rest.content])] == [(0, 33), (50, 60)]
