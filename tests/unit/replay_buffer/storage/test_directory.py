"""What a restart reads, what it finds, and what stays in memory meanwhile."""

from __future__ import annotations

import gc
import shutil
import sqlite3
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from leeway.errors import CorruptDataError
from leeway.types import GroupState, TrajectoryFailure, WriteItem, WriteStatus
from replay_buffer.storage import directory as storage_module
from replay_buffer.storage import index as index_module
from replay_buffer.storage.index_file import FILE
from replay_buffer.storage.log import LogFailedError
from replay_buffer.storage.segments import locations_of, segment_numbers, segment_path
from replay_buffer.storage.snapshots import snapshot_path, snapshot_positions
from tests.harness.replay_builders import RUN, chunk, described, version, whole
from tests.harness.replay_directory import opened

INDEX = FILE


@pytest.fixture(autouse=True)
def snapshot_at_each_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "_AMPLIFICATION", 0)


async def grown(directory: Path, steps: int = 8, *, cleanly: bool = False) -> object:
    """A log of several segments; returns its state."""
    async with opened(directory, cleanly=cleanly) as run:
        await run.open_run()
        for _ in range(steps):
            await run.step()
        return described(run.state)


async def test_a_restart_folds_the_tail_alone_and_finds_the_same(tmp_path: Path) -> None:
    before = await grown(tmp_path)
    newest = snapshot_positions(tmp_path)[-1]
    assert len(segment_numbers(tmp_path)) > 5
    assert newest.segment == segment_numbers(tmp_path)[-1]
    async with opened(tmp_path) as run:
        assert described(run.state) == before
        assert {place.segment for place in run.folded} == {newest.segment}


async def test_the_work_of_a_restart_does_not_grow_with_the_log(tmp_path: Path) -> None:
    folded: list[int] = []
    async with opened(tmp_path, cleanly=False) as run:
        await run.open_run()
    for _ in range(4):
        async with opened(tmp_path, cleanly=False) as run:
            for _ in range(6):
                await run.step()
        async with opened(tmp_path, cleanly=False) as run:
            folded.append(len(run.folded))
    most_in_a_segment = 2048 // 60
    assert all(count < most_in_a_segment for count in folded)


async def test_snapshots_are_a_small_part_of_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "_AMPLIFICATION", 8)
    await grown(tmp_path, 16)
    snapshots = sum(snapshot_path(tmp_path, position).stat().st_size for position in snapshot_positions(tmp_path))
    log_bytes = sum(segment_path(tmp_path, segment).stat().st_size for segment in segment_numbers(tmp_path))
    assert 0 < snapshots < log_bytes / 4


async def test_after_a_clean_stop_nothing_is_folded(tmp_path: Path) -> None:
    before = await grown(tmp_path, cleanly=True)
    async with opened(tmp_path, cleanly=False) as run:
        assert (run.folded, described(run.state)) == ([], before)
        await run.step()
        after = described(run.state)
    async with opened(tmp_path) as run:
        assert described(run.state) == after


async def test_ended_groups_leave_memory(tmp_path: Path) -> None:
    """Twice the history takes no more memory, whatever the log has grown to."""
    async with opened(tmp_path, segment_bytes=1 << 16) as run:
        await run.open_run()
        tracemalloc.start()
        try:
            sizes: list[int] = []
            for _ in range(3):
                for _ in range(30):
                    await run.step()
                gc.collect()
                sizes.append(tracemalloc.get_traced_memory()[0])
        finally:
            tracemalloc.stop()
        state, storage = run.state, run.buffer._store.storage
        assert state.consumed == 180
        assert len(state.groups.unended) <= 6
        assert not state.batches
        assert storage.index.num_recent < index_module._MOST_RECENT
        # Versions and caches that fill once; the 60 groups that ended meanwhile would take more than a kilobyte each.
        assert sizes[2] - sizes[1] < 30 * 1000, sizes


# What is asked about ended groups


async def test_ended_trajectories_answer_after_a_restart_as_before(tmp_path: Path) -> None:
    async with opened(tmp_path, cleanly=False) as run:
        await run.open_run()
        for _ in range(3):
            await run.step()
        tickets, *_ = await run.buffer.acquire_tickets(RUN, "s0", run.state.head, 4, 0)
        failed = tickets[0]
        items = [WriteItem(failed.members[0].trajectory_id, 1, 0, TrajectoryFailure("too long", retryable=False))]
        run.buffer.write(RUN, items)
        assert run.state.groups[failed.group_id].state is GroupState.DROPPED
    async with opened(tmp_path) as run:
        for group in (run.state.groups[f"{RUN}-g1"], run.state.groups[failed.group_id]):
            assert group.group_id not in run.state.groups.unended
        consumed = run.state.groups[f"{RUN}-g1"]
        (written, close) = whole_items(consumed.members[0].trajectory_id)
        other = WriteItem(written.trajectory_id, 1, 0, chunk([version(9)]))
        later = WriteItem(written.trajectory_id, 1, 2, chunk())
        late = WriteItem(failed.members[1].trajectory_id, 1, 0, chunk())
        answers = run.buffer.write(RUN, [written, close, other, later, *items, late])
        assert [answer.status for answer in answers] == [
            WriteStatus.ACKNOWLEDGED,
            WriteStatus.ACKNOWLEDGED,
            WriteStatus.CONFLICT,
            WriteStatus.INVALID,
            WriteStatus.ACKNOWLEDGED,
            WriteStatus.ABORTED,
        ]
        unknown = run.buffer.write(RUN, [WriteItem(f"{RUN}-g999.0", 1, 0, chunk()), WriteItem("x.0", 1, 0, chunk())])
        assert {answer.status for answer in unknown} == {WriteStatus.UNKNOWN}


def whole_items(trajectory_id: str) -> list[WriteItem]:
    from leeway.types import TicketMember

    return whole(TicketMember(trajectory_id, 0, 0), 1)


# Caches that cannot be used


def remove_index(directory: Path) -> None:
    (directory / INDEX).unlink()


def overwrite_index(directory: Path) -> None:
    (directory / INDEX).write_bytes(b"not a database" * 1000)
    (directory / f"{INDEX}-wal").unlink(missing_ok=True)


def empty_index(directory: Path) -> None:
    (directory / INDEX).write_bytes(b"")
    (directory / f"{INDEX}-wal").unlink(missing_ok=True)


def damage_newest_snapshot(directory: Path) -> None:
    path = snapshot_path(directory, snapshot_positions(directory)[-1])
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_newest_snapshot(directory: Path) -> None:
    path = snapshot_path(directory, snapshot_positions(directory)[-1])
    path.write_bytes(path.read_bytes()[:-5])


def remove_snapshots(directory: Path) -> None:
    for position in snapshot_positions(directory):
        snapshot_path(directory, position).unlink()


def lose_generation(directory: Path) -> None:
    (directory / "generation").unlink()


@pytest.mark.parametrize(
    "spoil",
    [
        remove_index,
        overwrite_index,
        empty_index,
        damage_newest_snapshot,
        cut_newest_snapshot,
        remove_snapshots,
        lose_generation,
    ],
)
@pytest.mark.parametrize("cleanly", [True, False])
async def test_what_cannot_be_used_is_made_anew_from_the_log(
    tmp_path: Path, spoil: Callable[[Path], None], *, cleanly: bool
) -> None:
    before = await grown(tmp_path, cleanly=cleanly)
    spoil(tmp_path)
    async with opened(tmp_path, cleanly=False) as run:
        assert described(run.state) == before
        await run.step()
        after = described(run.state)
    async with opened(tmp_path) as run:
        assert described(run.state) == after


async def test_an_index_that_is_behind_its_snapshot_is_made_anew(tmp_path: Path) -> None:
    await grown(tmp_path, 3, cleanly=True)
    shutil.copy(tmp_path / INDEX, tmp_path / "old")
    async with opened(tmp_path) as run:
        for _ in range(5):
            await run.step()
        before = described(run.state)
    for name in (INDEX, f"{INDEX}-wal", f"{INDEX}-shm"):
        (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / "old").rename(tmp_path / INDEX)
    async with opened(tmp_path) as run:
        assert described(run.state) == before


def fill_the_disk(file: sqlite3.Connection) -> None:
    pages = file.execute("PRAGMA page_count").fetchone()[0]
    assert file.execute(f"PRAGMA max_page_count = {pages}").fetchone()[0] == pages


async def test_an_index_that_fails_does_not_stop_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "_MOST_RECENT", 2)
    async with opened(tmp_path) as run:
        await run.open_run()
        await run.step()
        index = run.buffer._store.storage.index
        fill_the_disk(index._file)
        for _ in range(15):
            await run.step()
        assert run.state.consumed == 32
        assert index.num_recent >= 4
        assert [group.created for group in run.state.ended.groups()] == list(range(1, 33))
    async with opened(tmp_path) as run:
        assert run.state.consumed == 32
        assert run.state.groups[f"{RUN}-g32"].state is GroupState.CONSUMED


async def test_an_index_that_a_write_finds_damaged_ends_the_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would not get better by waiting, while everything that ends stays in memory."""
    monkeypatch.setattr(index_module, "_MOST_RECENT", 2)
    async with opened(tmp_path) as run:
        await run.open_run()
        await run.step()
        file = run.buffer._store.storage.index._file
        file.set_authorizer(
            lambda action, _table, _column, database, _trigger: (
                sqlite3.SQLITE_DENY if (action, database) == (sqlite3.SQLITE_INSERT, "main") else sqlite3.SQLITE_OK
            )
        )
        with pytest.raises(LogFailedError, match=r"index\.sqlite: .*; start the replay buffer again"):
            await run.step()
        consumed = run.state.consumed
        file.set_authorizer(None)
    async with opened(tmp_path) as run:
        assert run.state.consumed >= consumed
        assert len(list(run.state.ended.groups())) == run.state.consumed


async def test_a_snapshot_ahead_of_the_log_is_passed_over(tmp_path: Path) -> None:
    """The log was put back, the snapshot not."""
    await grown(tmp_path, 3, cleanly=False)
    shutil.copytree(tmp_path, tmp_path.parent / "old")
    async with opened(tmp_path.parent / "old", cleanly=False) as run:
        before = described(run.state)
    async with opened(tmp_path) as run:
        for _ in range(5):
            await run.step()
    for segment in segment_numbers(tmp_path):
        segment_path(tmp_path, segment).unlink()
    for segment in segment_numbers(tmp_path.parent / "old"):
        shutil.copy(segment_path(tmp_path.parent / "old", segment), segment_path(tmp_path, segment))
    async with opened(tmp_path) as run:
        assert described(run.state) == before


async def test_a_snapshot_of_another_log_with_the_same_name_is_passed_over(tmp_path: Path) -> None:
    """The log was put back and went on differently up to the same place."""
    before = await grown(tmp_path, cleanly=False)
    newest = snapshot_positions(tmp_path)[-1]
    path = segment_path(tmp_path, newest.segment - 1)
    data = bytearray(path.read_bytes())
    last = data.rindex(b"test-run")
    assert last > len(data) - 200
    from replay_buffer.storage.segments import HEADER, crc32c, verify_segment

    offset, payload = list(verify_segment(path, last=False))[-1]
    changed = payload.replace(b"test-run", b"test-run", 1)
    stamp = bytearray(changed)
    stamp[3] ^= 1  # of the time at which it was recorded
    data[offset - HEADER.size :] = HEADER.pack(len(stamp), crc32c(bytes(stamp))) + stamp
    path.write_bytes(data)
    async with opened(tmp_path) as run:
        assert {place.segment for place in run.folded} >= {newest.segment - 1, newest.segment}
        assert described(run.state)["consumed"] == before["consumed"]  # type: ignore[index]


async def test_what_lies_behind_a_snapshot_is_never_written_before_it(tmp_path: Path) -> None:
    """The snapshot is of the end of the log's last segment, whose follower has no record yet."""
    before = await grown(tmp_path, cleanly=False)
    numbers = segment_numbers(tmp_path)
    newest = snapshot_positions(tmp_path)[-1]
    assert newest == (numbers[-1], 0)
    segment_path(tmp_path, numbers[-1]).unlink()
    async with opened(tmp_path, cleanly=False, segment_bytes=1 << 20) as run:
        assert run.folded == []
        await run.step()
        after = described(run.state)
    assert segment_numbers(tmp_path) == numbers
    async with opened(tmp_path) as run:
        assert described(run.state) == after != before


async def test_damage_before_the_snapshot_is_found_when_it_is_read(tmp_path: Path) -> None:
    await grown(tmp_path, cleanly=False)
    path = segment_path(tmp_path, 1)
    data = bytearray(path.read_bytes())
    async with opened(tmp_path) as run:
        location = locations_of(run.state.groups[f"{RUN}-g1"].members[0])[0]
        data[location.offset + 20] ^= 1
        path.write_bytes(data)
        with pytest.raises(CorruptDataError, match="damaged on disk"):
            run.buffer.read_many([location])
