"""What keeps the write and draw path cheap must not change what is written, judged and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from leeway.errors import CorruptDataError
from leeway.trajectory.assembly import assemble_records
from leeway.types import DropReason, GroupState, TrajectoryFailure, WriteItem, WriteStatus
from leeway.v1 import log_pb2, replay_pb2
from replay_buffer.live.open_trajectories import OpenTrajectories
from replay_buffer.rpc.response_stream import messages
from replay_buffer.rules.transitions import ChunkWritten, TrajectoryClosed
from replay_buffer.storage.log import Log, LogOptions
from replay_buffer.storage.records import Record, decode, encode, stored_chunk
from replay_buffer.storage.segment_reader import SegmentReader
from replay_buffer.storage.segments import Location, frame, segment_path
from tests.harness.replay_builders import ROOT, Machine, chunk, close, described, spec, whole

ACKNOWLEDGED = WriteStatus.ACKNOWLEDGED


@pytest.mark.parametrize("size_bytes", [0, 1, 127, 128, 20_000])
def test_a_chunk_is_recorded_as_protobuf_would(size_bytes: int) -> None:
    data = bytes(size_bytes)
    payload = b"".join(encode(Record("a-run", 1_700_000_000_123_456_789, ChunkWritten("a-run-g1.0", 3, 300, data, ()))))
    expected = log_pb2.LogRecord(run="a-run")
    expected.recorded_at.FromNanoseconds(1_700_000_000_123_456_789)
    expected.chunk_written.CopyFrom(log_pb2.ChunkWritten(trajectory_id="a-run-g1.0", attempt=3, seq=300, chunk=data))
    assert log_pb2.LogRecord.FromString(payload) == expected
    assert stored_chunk(payload) == data


def test_another_record_is_no_chunk() -> None:
    closed = b"".join(encode(Record("r", 1, TrajectoryClosed("r-g1.0", 1, close([chunk()])))))
    with pytest.raises(CorruptDataError, match="trajectory_closed where a chunk should be"):
        stored_chunk(closed)


def test_a_record_encoded_in_another_order_is_read_all_the_same() -> None:
    run = log_pb2.LogRecord(run="r").SerializeToString()
    payload = b"".join(encode(Record("r", 0, ChunkWritten("r-g1.0", 1, 0, chunk(), ()))))
    assert run in payload
    assert stored_chunk(payload.replace(run, b"", 1) + run) == chunk()


# OpenTrajectories


def test_a_close_is_judged_by_the_log_when_its_chunks_were_written_before_a_restart() -> None:
    machine = Machine(spec(members=2))
    (ticket,) = machine.acquire(max_members=2)
    good, bad = whole(ticket.members[0], 1), whole(ticket.members[1], 1, chunk(token_id=64))
    machine.write(good[0], bad[0])
    machine.open_trajectories = OpenTrajectories()
    assert [result.status for result in machine.write(good[1], bad[1])] == [ACKNOWLEDGED] * 2
    group = machine.state.groups[ticket.group_id]
    assert group.drop_reason is DropReason.INVALID
    assert "outside the vocabulary" in group.drop_message
    assert ticket.members[1].trajectory_id in group.drop_message


def test_a_close_is_judged_without_reading_what_was_just_written() -> None:
    machine = Machine(spec(members=1))
    (ticket,) = machine.acquire(max_members=1)

    def read(_: Location) -> None:
        raise AssertionError("read back")

    machine.read = read  # type: ignore[method-assign, assignment]
    machine.write(*whole(ticket.members[0], 1))
    assert machine.states() == {GroupState.READY: 1}


def test_forgotten_drafts_change_no_judgement() -> None:
    machine = Machine(spec(members=2))
    machine.open_trajectories = OpenTrajectories(most=1)
    (ticket,) = machine.acquire(max_members=2)
    items = [whole(member, 1) for member in ticket.members]
    machine.write(items[0][0], items[1][0], items[0][1], items[1][1])
    assert machine.states() == {GroupState.READY: 1}


def test_an_attempt_does_not_inherit_the_draft_of_the_one_before() -> None:
    machine = Machine(spec(members=1))
    (ticket,) = machine.acquire(max_members=1)
    machine.write(whole(ticket.members[0], 1, chunk(token_id=64))[0])
    (again,) = machine.acquire(max_members=1, expired=lambda _: True)
    machine.write(*whole(again.members[0], again.attempt))
    assert machine.states() == {GroupState.READY: 1}


def test_a_chunk_that_is_refused_leaves_no_trace_in_the_draft() -> None:
    machine = Machine(spec(members=1))
    (ticket,) = machine.acquire(max_members=1)
    first, last = whole(ticket.members[0], 1)
    assert machine.write(first._replace(content=b"\xff\xff"))[0].status is WriteStatus.INVALID
    assert machine.write(first, room=False)[0].status is WriteStatus.EXHAUSTED
    machine.write(first, first, last)
    assert machine.states() == {GroupState.READY: 1}


# Draws


def test_what_is_streamed_stays_as_it_was_while_writes_go_on() -> None:
    machine = Machine(spec(groups_per_step=1, members=1))
    (ticket,) = machine.acquire(max_members=1)
    first, last = whole(ticket.members[0], 1)
    machine.write(first)
    live = machine.state.groups[ticket.group_id]
    frozen = live.frozen()
    before = described(frozen)
    assert before == described(live)
    machine.write(last)
    assert live.state is GroupState.READY
    assert described(frozen) == before


def test_a_draw_is_what_protobuf_makes_of_it() -> None:
    machine = Machine(spec(groups_per_step=1, members=2))
    (ticket,) = machine.acquire(max_members=2)
    closed, failed = ticket.members
    machine.write(*whole(closed, 1), WriteItem(failed.trajectory_id, 1, 0, chunk()))
    machine.write(WriteItem(failed.trajectory_id, 1, 1, TrajectoryFailure("the engine died", retryable=False)))
    group = machine.state.groups[ticket.group_id].frozen()

    def read_many(locations: Sequence[Location]) -> list[bytes]:
        return [machine.records[location.offset] for location in locations]

    (message,) = messages([group], read_many)
    reply = replay_pb2.DrawBatchResponse.FromString(message)
    assert reply.SerializeToString() == message
    assert replay_pb2.ExportGroupsResponse.FromString(message).pieces == reply.pieces
    (record,) = assemble_records(reply.pieces)
    assert [trajectory.chunks for trajectory in record.trajectories] == [(chunk(),), (chunk(),)]
    assert record.trajectories[0].close == close([chunk()])
    assert record.trajectories[1].failure == "the engine died"
    assert [piece.trajectory.chunk_count for piece in reply.pieces if piece.HasField("trajectory")] == [1, 1]


@pytest.fixture
def segments(tmp_path: Path) -> tuple[Path, dict[Location, bytes]]:
    """Records of many sizes in two segments."""
    written: dict[Location, bytes] = {}
    for segment in (1, 2):
        data = b""
        for number, size_bytes in enumerate((10, 200_000, 1, 5_000, 70_000, 70_000, 9)):
            payload = bytes([segment, number]) * size_bytes
            written[Location(segment, len(data) + 8, len(payload))] = payload
            data += frame(payload)
        segment_path(tmp_path, segment).write_bytes(data)
    return tmp_path, written


@pytest.mark.parametrize("step", [1, -1, 2, 3])
def test_many_records_are_those_read_one_by_one(segments: tuple[Path, dict[Location, bytes]], step: int) -> None:
    directory, written = segments
    reader = SegmentReader(directory)
    wanted = [*list(written)[::step], next(iter(written))]
    assert reader.read_many(wanted) == [written[location] for location in wanted]
    assert [reader.read(location) for location in wanted] == [written[location] for location in wanted]
    reader.close()


@pytest.mark.parametrize("number", [0, 1, 4])
@pytest.mark.parametrize("at", [-1, -6, 0])
def test_damage_is_found_among_many(segments: tuple[Path, dict[Location, bytes]], number: int, at: int) -> None:
    directory, written = segments
    damaged = list(written)[number]
    path = segment_path(directory, 1)
    data = bytearray(path.read_bytes())
    data[damaged.offset + at] ^= 1
    path.write_bytes(data)
    reader = SegmentReader(directory)
    with pytest.raises(CorruptDataError, match=f"record at byte {damaged.offset - 8} is damaged on disk"):
        reader.read_many(list(written))
    reader.close()


# Group commit


async def test_records_in_parts_and_large_ones_keep_their_order(tmp_path: Path) -> None:
    payloads = [bytes([number]) * size for number, size in enumerate((5, 40_000, 3, 100_000, 100_000, 1))]
    log = Log(LogOptions(tmp_path))
    log.start()
    places = [log.append(payload[:2], payload[2:]) for payload in payloads]
    assert [log.read(place) for place in places] == payloads
    await log.durable()
    assert log.durable_mark == log.mark == len(payloads)
    assert log.read_many(places[::-1]) == payloads[::-1]
    await log.aclose()
    assert segment_path(tmp_path, 1).read_bytes() == b"".join(map(frame, payloads))


async def test_the_first_fsync_is_not_late_and_a_full_batch_does_not_wait(tmp_path: Path) -> None:
    log = Log(LogOptions(tmp_path, commit_seconds=600.0, commit_bytes=1000))
    log.start()
    log.append(b"first")
    await log.durable()
    for _ in range(3):
        log.append(bytes(1000))
        await log.durable()
    log.append(b"waits")
    await log.aclose()
    assert segment_path(tmp_path, 1).read_bytes().endswith(frame(b"waits")), "an end does not wait either"


def test_versions_of_a_chunk_are_read_without_its_columns() -> None:
    written = decode(b"".join(encode(Record("r", 1, ChunkWritten("r-g1.0", 1, 0, chunk(), ()))))).transition
    assert isinstance(written, ChunkWritten)
    assert written.versions == (ROOT,)
