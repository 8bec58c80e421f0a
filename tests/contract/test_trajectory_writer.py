"""The writer against a replay buffer that breaks streams, loses answers, runs full and refuses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from inference_server.rollout.trajectory_writer import TrajectoryWriter
from inference_server.rollout.write_window import MAX_ITEM_BYTES
from leeway.config import WriterOptions
from leeway.errors import InvalidDataError, PreconditionError, UnavailableError
from leeway.replay_client import ReplayClient
from leeway.rpc import Security, cancel_and_wait
from leeway.service.ports import free_port
from leeway.types import WriteItem, WriteResult, WriteStatus
from tests.contract.fake_replay import RUN, FakeReplay, result, serving

FAST = WriterOptions(flush_seconds=0.0, batch_items=4)


@asynccontextmanager
async def writing(
    replay: FakeReplay, options: WriterOptions = FAST
) -> AsyncGenerator[tuple[TrajectoryWriter, list[WriteResult], asyncio.Task[None]], None]:
    refused: list[WriteResult] = []
    async with serving(replay) as server:
        client = ReplayClient(f"127.0.0.1:{server.port}", RUN, Security())
        writer = TrajectoryWriter(client, "server-0", options, refused.append)
        task = asyncio.create_task(writer.run())
        try:
            yield writer, refused, task
        finally:
            await cancel_and_wait(task)
            await client.aclose()


def items(trajectory_id: str, count: int, size_bytes: int = 10) -> list[WriteItem]:
    return [WriteItem(trajectory_id, 1, seq, bytes([seq % 256]) * size_bytes) for seq in range(count)]


def stored(replay: FakeReplay, trajectory_id: str) -> list[int]:
    return [item.seq for item in replay.written[trajectory_id, 1].items]


async def test_items_of_many_trajectories_share_messages_and_keep_their_order() -> None:
    replay = FakeReplay()
    async with writing(replay, WriterOptions(batch_items=30).model_copy(update={"flush_seconds": 600.0})) as (
        writer,
        refused,
        _,
    ):
        for first, second in zip(items("a", 15), items("b", 15), strict=True):
            await writer.write([first, second])
        await writer.drain()
        assert replay.max_in_message == 30  # a full batch does not wait for the timer, and nothing was sent before it
        assert stored(replay, "a") == stored(replay, "b") == list(range(15))
        assert replay.streams == 1
        assert not refused
        assert writer.num_unacknowledged == 0


@pytest.mark.parametrize("cut", ["before", "after"])
async def test_a_broken_stream_is_opened_again_with_what_was_not_acknowledged(cut: str) -> None:
    replay = FakeReplay()
    replay.break_stream = lambda stream, item: cut if item.seq == 5 and stream <= 3 else ""
    async with writing(replay) as (writer, refused, _):
        # An answer that comes just before its stream breaks may be lost: the first ones are waited for.
        await writer.write(items("a", 12)[:4])
        await writer.drain()
        await writer.write(items("a", 12)[4:])
        await writer.drain()
        assert stored(replay, "a") == list(range(12))
        assert replay.streams == 4
        assert not refused
        assert [item.seq for item in replay.arrived].count(0) == 1  # what is acknowledged is not sent again


async def test_a_buffer_that_restarts_gets_everything() -> None:
    replay = FakeReplay()
    address = f"127.0.0.1:{free_port('127.0.0.1')}"  # nobody else gets it meanwhile
    async with serving(replay, address) as server:
        client = ReplayClient(address, RUN, Security())
        writer = TrajectoryWriter(client, "server-0", FAST, lambda _: None)
        task = asyncio.create_task(writer.run())
        await writer.write(items("a", 6))
        await writer.drain()
        await server.stop(0.0)
        await writer.write(items("b", 6))
        async with serving(replay, address):
            await writer.drain()
        assert stored(replay, "a") == stored(replay, "b") == list(range(6))
        await cancel_and_wait(task)
        await client.aclose()


async def test_a_full_window_holds_writers_back_and_opens_again() -> None:
    replay = FakeReplay()
    gate = {"open": False}

    def judge(item: WriteItem) -> WriteResult | None:
        return None if gate["open"] else result(item, WriteStatus.EXHAUSTED)

    replay.judge = judge
    options = WriterOptions(flush_seconds=0.0, window_items=8, exhausted_wait_seconds=0.01)
    async with writing(replay, options) as (writer, _, _task):
        await writer.write(items("a", 8))
        blocked = asyncio.create_task(writer.write(items("b", 3)))
        while not replay.arrived:
            await asyncio.wait({blocked}, timeout=0.01)
        assert not blocked.done()
        assert writer.num_unacknowledged == 8
        gate["open"] = True
        await blocked
        await writer.drain()
        assert stored(replay, "a") == list(range(8))
        assert stored(replay, "b") == list(range(3))


async def test_the_window_counts_bytes_but_lets_a_large_item_through_when_empty() -> None:
    replay = FakeReplay()
    async with writing(replay, WriterOptions(flush_seconds=0.0, window_bytes=1000)) as (writer, _, _task):
        await writer.write(items("a", 1, size_bytes=5000))
        blocked = asyncio.create_task(writer.write(items("b", 1)))
        await writer.drain()
        await blocked
        await writer.drain()
        assert stored(replay, "b") == [0]
        with pytest.raises(InvalidDataError, match="message limit"):
            await writer.write(items("c", 1, size_bytes=MAX_ITEM_BYTES + 1))


async def test_a_full_disk_is_waited_out_in_order() -> None:
    replay = FakeReplay()
    refusals = iter([True] * 3)

    def judge(item: WriteItem) -> WriteResult | None:
        # Item 2 of "a" finds no room three times; what follows it in flight is out of range meanwhile.
        if (item.trajectory_id, item.seq) == ("a", 2) and next(refusals, False):
            return result(item, WriteStatus.EXHAUSTED)
        return None

    replay.judge = judge
    async with writing(replay, WriterOptions(flush_seconds=0.0, batch_items=3, exhausted_wait_seconds=0.0)) as (
        writer,
        refused,
        _,
    ):
        await writer.write([*items("a", 6), *items("b", 3)])
        await writer.drain()
        assert stored(replay, "a") == list(range(6))
        assert stored(replay, "b") == list(range(3))
        assert not refused
        assert replay.streams == 1


async def test_a_refused_stream_comes_back_when_it_was_told_to() -> None:
    replay = FakeReplay()
    replay.break_stream = lambda stream, item: "exhausted" if item.seq == 5 and stream <= 3 else ""
    # Left to itself the writer would wait for ever.
    options = WriterOptions(flush_seconds=0.0, batch_items=1, exhausted_wait_seconds=1e6)
    async with writing(replay, options) as (writer, refused, _):
        await writer.write(items("a", 8))
        await writer.drain()
        assert stored(replay, "a") == list(range(8))
        assert replay.streams == 4
        assert not refused


async def test_an_item_that_found_no_room_is_sent_again_when_it_was_told_to() -> None:
    replay = FakeReplay()
    refusals = iter([True] * 3)

    def judge(item: WriteItem) -> WriteResult | None:
        refused = item.seq == 2 and next(refusals, False)
        return result(item, WriteStatus.EXHAUSTED)._replace(retry_seconds=0.01) if refused else None

    replay.judge = judge
    async with writing(replay, WriterOptions(flush_seconds=0.0, exhausted_wait_seconds=1e6)) as (writer, refused, _):
        await writer.write(items("a", 6))
        await writer.drain()
        assert stored(replay, "a") == list(range(6))
        assert replay.streams == 1
        assert not refused


async def test_refusals_are_reported_once_and_nothing_waits_for_them() -> None:
    replay = FakeReplay()
    verdicts = {
        ("a", 1): WriteStatus.ABORTED,
        ("b", 0): WriteStatus.CONFLICT,
        ("c", 0): WriteStatus.INVALID,
        ("d", 0): WriteStatus.UNKNOWN,
    }

    def judge(item: WriteItem) -> WriteResult | None:
        status = verdicts.get((item.trajectory_id, item.seq))
        return result(item, status, message="because") if status else None

    replay.judge = judge
    async with writing(replay) as (writer, refused, _):
        for name in "abcd":
            await writer.write(items(name, 2))
        await writer.drain()
        seen = {(answer.trajectory_id, answer.seq): answer.status for answer in refused}
        for key, status in verdicts.items():
            assert seen[key] is status
        # What follows a refused item is out of range for good: refused as well, not sent for ever.
        assert seen["c", 1] is WriteStatus.OUT_OF_RANGE
        assert len(refused) == len(seen)


async def test_answers_out_of_order_break_the_stream() -> None:
    replay = FakeReplay()
    state = {"lies": 1}

    def judge(item: WriteItem) -> WriteResult | None:
        if state["lies"] and item.seq == 1:
            state["lies"] -= 1
            replay.write(item)
            return WriteResult("other", 1, 0, WriteStatus.ACKNOWLEDGED)
        return None

    replay.judge = judge
    async with writing(replay) as (writer, refused, _):
        await writer.write(items("a", 4))
        await writer.drain()
        assert replay.streams == 2
        assert stored(replay, "a") == [0, 1, 2, 3]
        assert not refused


async def test_a_buffer_that_never_answers_ends_the_writer_with_a_line() -> None:
    replay = FakeReplay()
    replay.break_stream = lambda _stream, _item: "before"
    options = WriterOptions(flush_seconds=0.0, patience_seconds=0.2)
    async with writing(replay, options) as (writer, _, task):
        await writer.write(items("a", 2))
        with pytest.raises(UnavailableError, match=r"answered no write for 0.2 s .*cut before"):
            await task
        with pytest.raises(UnavailableError):
            await writer.write(items("b", 1))
        with pytest.raises(UnavailableError):
            await writer.drain()


async def test_a_hanging_buffer_is_left_for_a_new_stream() -> None:
    replay = FakeReplay()
    hang = asyncio.Event()
    write = replay.WriteTrajectories

    async def write_trajectories(request_iterator: Any, context: Any) -> AsyncIterator[Any]:
        if replay.streams == 0:
            replay.streams += 1
            await hang.wait()
        async for response in write(request_iterator, context):
            yield response

    replay.WriteTrajectories = write_trajectories
    async with writing(replay, WriterOptions(flush_seconds=0.0, answer_timeout_seconds=0.2)) as (writer, _, _task):
        await writer.write(items("a", 2))
        await writer.drain()
        assert stored(replay, "a") == [0, 1]
        hang.set()


async def test_a_buffer_that_refuses_the_stream_ends_the_writer() -> None:
    replay = FakeReplay()

    async def write_trajectories(request_iterator: Any, context: Any) -> AsyncIterator[Any]:
        raise PreconditionError("run 'rehearsal' was never opened here")
        yield

    replay.WriteTrajectories = write_trajectories
    async with writing(replay) as (writer, _, task):
        await writer.write(items("a", 1))
        with pytest.raises(PreconditionError, match="never opened"):
            await task
