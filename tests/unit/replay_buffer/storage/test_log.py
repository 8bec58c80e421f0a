"""The log on real files, and on disks that fill up, fail or lose what was not synced."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import struct
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from leeway.errors import ConfigError, CorruptDataError
from replay_buffer.storage.log import Log, LogFailedError, LogOptions
from replay_buffer.storage.segments import AppendFile, Location, SegmentFile, frame, segment_path
from tests.deadlines import WAIT_SECONDS


@asynccontextmanager
async def opened(options: LogOptions) -> AsyncGenerator[tuple[Log, list[bytes]]]:
    """A running log, and what it held when it was opened."""
    log, held = Log(options), list[bytes]()
    try:
        log.recover(lambda payload, _: held.append(payload))
        log.start()
        async with asyncio.timeout(WAIT_SECONDS):
            yield log, held
    finally:
        await log.aclose()


async def written(directory: Path, payloads: list[bytes], segment_bytes: int = 64 << 20) -> list[Location]:
    async with opened(LogOptions(directory, segment_bytes)) as (log, _):
        locations = [log.append(payload) for payload in payloads]
        await log.durable()
    return locations


async def held_by(directory: Path) -> list[bytes]:
    async with opened(LogOptions(directory)) as (_, held):
        return held


PAYLOADS = [b"first", b"\0" * 40, b"x" * 300, b"the last one"]


async def test_what_was_appended_is_there_again_in_order(tmp_path: Path) -> None:
    locations = await written(tmp_path, PAYLOADS)
    async with opened(LogOptions(tmp_path)) as (log, held):
        assert held == PAYLOADS
        assert [log.read(location) for location in locations] == PAYLOADS
        log.append(b"more")
        await log.durable()
    assert await held_by(tmp_path) == [*PAYLOADS, b"more"]


async def test_a_record_can_be_read_before_it_is_on_disk(tmp_path: Path) -> None:
    async with opened(LogOptions(tmp_path)) as (log, _):
        location = log.append(b"early")
        assert log.read(location) == b"early"
        await log.durable()
        assert log.read(location) == b"early"


async def test_a_full_segment_is_followed_by_a_new_one(tmp_path: Path) -> None:
    payloads = [bytes([number]) * 100 for number in range(1, 30)]
    locations = await written(tmp_path, payloads, segment_bytes=500)
    assert {location.segment for location in locations} == set(range(1, 9))
    assert all(segment_path(tmp_path, segment).stat().st_size <= 500 for segment in range(1, 9))
    async with opened(LogOptions(tmp_path, 500)) as (log, held):
        assert held == payloads
        assert [log.read(location) for location in locations] == payloads


async def test_a_missing_segment_is_refused(tmp_path: Path) -> None:
    await written(tmp_path, [b"x" * 100] * 10, segment_bytes=300)
    segment_path(tmp_path, 2).unlink()
    with pytest.raises(CorruptDataError, match=r"segment-00000002\.log is missing"):
        await held_by(tmp_path)


# Torn tails and damage


@pytest.mark.parametrize("zeros", [0, 64])
async def test_a_tail_torn_at_any_byte_is_cut_off(tmp_path: Path, zeros: int) -> None:
    """Zeros: the file had grown before its bytes arrived."""
    await written(tmp_path, PAYLOADS)
    path = segment_path(tmp_path, 1)
    whole = path.read_bytes()
    last = len(whole) - len(frame(PAYLOADS[-1]))
    for size in range(last, len(whole)):
        path.write_bytes(whole[:size] + bytes(zeros))
        assert await held_by(tmp_path) == PAYLOADS[:-1], size
        assert path.stat().st_size == last
    # What comes next follows the last whole record.
    await written(tmp_path, [b"after the cut"])
    assert await held_by(tmp_path) == [*PAYLOADS[:-1], b"after the cut"]


async def test_a_last_record_with_a_wrong_checksum_is_cut_off(tmp_path: Path) -> None:
    await written(tmp_path, PAYLOADS)
    path = segment_path(tmp_path, 1)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert await held_by(tmp_path) == PAYLOADS[:-1]


@pytest.mark.parametrize("place", ["length", "checksum", "payload"])
async def test_damage_with_data_behind_it_is_refused_with_its_place(tmp_path: Path, place: str) -> None:
    locations = await written(tmp_path, PAYLOADS)
    path = segment_path(tmp_path, 1)
    data = bytearray(path.read_bytes())
    begin = locations[2].offset - 8
    # A length beyond the end looks like a torn tail, but whole records follow.
    data[begin + {"length": 3, "checksum": 4, "payload": 8}[place]] ^= 0x40
    path.write_bytes(data)
    with pytest.raises(CorruptDataError, match=rf"segment-00000001\.log: the record at byte {begin} is damaged"):
        await held_by(tmp_path)
    assert path.stat().st_size == len(data), "nothing was cut off"


async def test_a_segment_that_is_not_the_last_must_be_whole(tmp_path: Path) -> None:
    await written(tmp_path, [b"x" * 100] * 5, segment_bytes=300)
    path = segment_path(tmp_path, 1)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CorruptDataError, match=r"segment-00000001\.log"):
        await held_by(tmp_path)


async def test_damage_is_noticed_when_a_record_is_read(tmp_path: Path) -> None:
    locations = await written(tmp_path, PAYLOADS)
    async with opened(LogOptions(tmp_path)) as (log, _):
        path = segment_path(tmp_path, 1)
        data = bytearray(path.read_bytes())
        data[locations[1].offset] ^= 1
        path.write_bytes(data)
        with pytest.raises(CorruptDataError, match="damaged on disk"):
            log.read(locations[1])


async def test_a_second_process_is_refused(tmp_path: Path) -> None:
    async with opened(LogOptions(tmp_path)):
        with pytest.raises(ConfigError, match="in use by another replay buffer"):
            Log(LogOptions(tmp_path))
    assert await held_by(tmp_path) == []


async def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"replay_buffer\.directory: cannot use .*file/log"):
        Log(LogOptions(tmp_path / "file" / "log"))


# Disks that fail


class Disk:
    """Real files, with what goes wrong on top, and an account of what is durable."""

    def __init__(self) -> None:
        self.durable_bytes: dict[Path, int] = {}
        self.syncs = 0
        self.room: int | None = None  # bytes that still fit; None: any number
        self.sync_error: int | None = None
        self.write_error: int | None = None
        self.may_sync = threading.Event()
        self.may_sync.set()
        self.sync_begun = threading.Event()
        self.refused = threading.Semaphore(0)  # released by each write that found the disk full

    def open(self, path: Path) -> SegmentFile:
        return _File(self, path)

    def lose_power(self) -> None:
        """Keep what was synced, and nothing else."""
        for path, size in self.durable_bytes.items():
            os.truncate(path, size)


class _File:
    def __init__(self, disk: Disk, path: Path) -> None:
        self._disk, self._path, self._file = disk, path, AppendFile(path)
        disk.durable_bytes.setdefault(path, path.stat().st_size)

    def write(self, blocks: Sequence[bytes | memoryview]) -> int:
        disk = self._disk
        if disk.write_error is not None:
            raise OSError(disk.write_error, os.strerror(disk.write_error))
        if disk.room is not None:
            if not disk.room:
                disk.refused.release()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            blocks = [b"".join(blocks)[: disk.room]]
            disk.room -= len(blocks[0])
        return self._file.write(blocks)

    def sync(self) -> None:
        self._disk.sync_begun.set()
        assert self._disk.may_sync.wait(WAIT_SECONDS)
        if self._disk.sync_error is not None:
            raise OSError(self._disk.sync_error, os.strerror(self._disk.sync_error))
        self._file.sync()
        self._disk.syncs += 1
        self._disk.durable_bytes[self._path] = self._path.stat().st_size

    def truncate(self, size_bytes: int) -> None:
        self._file.truncate(size_bytes)

    def close(self) -> None:
        self._file.close()


def on(disk: Disk, directory: Path) -> LogOptions:
    return LogOptions(directory, retry_seconds=0.005, open_file=disk.open)


async def test_what_is_durable_survives_the_loss_of_everything_unsynced(tmp_path: Path) -> None:
    disk = Disk()
    async with opened(on(disk, tmp_path)) as (log, _):
        acknowledged: list[bytes] = []
        for number in range(20):
            payloads = [b"%d.%d" % (number, part) for part in range(5)]
            for payload in payloads:
                log.append(payload)
            await log.durable()
            acknowledged += payloads
        disk.may_sync.clear()
        disk.sync_begun.clear()
        log.append(b"never acknowledged")
        waiting = asyncio.create_task(log.durable())
        assert await asyncio.to_thread(disk.sync_begun.wait, WAIT_SECONDS)
        assert not waiting.done(), "written is not durable"
        disk.lose_power()
        disk.sync_error = errno.EIO
        disk.may_sync.set()
        with pytest.raises(LogFailedError):
            await waiting
    assert await held_by(tmp_path) == acknowledged


async def test_one_sync_covers_everything_of_a_turn(tmp_path: Path) -> None:
    disk = Disk()
    async with opened(on(disk, tmp_path)) as (log, _):
        for _ in range(500):
            log.append(b"x" * 50)
        await log.durable()
    assert disk.syncs == 1


async def test_a_mark_is_reached_before_what_comes_after_it(tmp_path: Path) -> None:
    disk = Disk()
    async with opened(on(disk, tmp_path)) as (log, _):
        log.append(b"first")
        mark = log.mark
        await log.durable()
        disk.may_sync.clear()
        log.append(b"second")
        await log.durable(mark)
        assert not disk.may_sync.is_set()
        disk.may_sync.set()


@pytest.mark.parametrize(
    ("fail", "text"),
    [
        (lambda disk: setattr(disk, "sync_error", errno.EIO), "Input/output error"),
        (lambda disk: setattr(disk, "write_error", errno.EIO), "Input/output error"),
        (lambda disk: setattr(disk, "sync_error", errno.ENOSPC), "No space left"),
    ],
)
async def test_an_error_of_the_disk_kills_the_log(tmp_path: Path, fail: Callable[[Disk], None], text: str) -> None:
    disk = Disk()
    async with opened(on(disk, tmp_path)) as (log, _):
        log.append(b"good")
        await log.durable()
        fail(disk)
        log.append(b"bad")
        with pytest.raises(LogFailedError, match=text):
            await log.durable()
        with pytest.raises(LogFailedError, match=r"segment-00000001\.log.*restart to verify"):
            await log.wait_failed()
        # The disk has recovered, the log has not: it is not asked again.
        disk.sync_error = disk.write_error = None
        with pytest.raises(LogFailedError):
            log.append(b"more")
        with pytest.raises(LogFailedError):
            await log.durable()
    assert (await held_by(tmp_path))[0] == b"good"


async def test_a_full_disk_delays_and_loses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    disk = Disk()
    async with opened(on(disk, tmp_path)) as (log, _):
        log.append(b"before")
        await log.durable()
        disk.room = 30  # less than the next batch: a part of it lands on the disk
        payloads = [b"%d" % number * 20 for number in range(5)]
        for payload in payloads:
            log.append(payload)
        waiting = asyncio.create_task(log.durable())
        with caplog.at_level(logging.ERROR):
            for _ in range(3):
                assert await asyncio.to_thread(disk.refused.acquire, timeout=WAIT_SECONDS)
            assert log.stalled
            assert not waiting.done()
            assert [record.getMessage() for record in caplog.records] == [
                f"{tmp_path}: No space left on device; nothing is acknowledged until there is room: free some space"
            ]
        assert segment_path(tmp_path, 1).stat().st_size == disk.durable_bytes[segment_path(tmp_path, 1)]
        disk.room = None
        await waiting
        assert not log.stalled
    assert await held_by(tmp_path) == [b"before", *payloads]


async def test_a_stop_on_a_full_disk_ends(tmp_path: Path) -> None:
    disk = Disk()
    async with opened(on(disk, tmp_path)) as (log, _):
        disk.room = 0
        log.append(b"does not fit")
        waiting = asyncio.create_task(log.durable())
    with pytest.raises(LogFailedError, match="stopped while the disk was full"):
        await waiting
    assert await held_by(tmp_path) == []


def test_the_frame_is_what_the_contract_says() -> None:
    # CRC-32C of "123456789" is the check value of the Castagnoli polynomial.
    assert frame(b"123456789") == struct.pack("<II", 9, 0xE3069283) + b"123456789"


async def test_many_blocks_and_short_writes_keep_every_byte(tmp_path: Path) -> None:
    """More blocks than one system call takes, on a disk that takes a little at a time."""
    payloads = [bytes([number % 251]) * (40_000 if number % 2 else 3) for number in range(2100)]

    class Short(AppendFile):
        def write(self, blocks: Sequence[bytes | memoryview]) -> int:
            assert len(blocks) <= 1024
            return super().write([memoryview(b"".join(blocks))[:700_001]])

    log = Log(LogOptions(tmp_path, open_file=Short))
    log.start()
    for payload in payloads:
        log.append(payload)
    await log.durable()
    await log.aclose()
    assert segment_path(tmp_path, 1).read_bytes() == b"".join(map(frame, payloads))
