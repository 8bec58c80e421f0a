"""Offline: a directory is read and checked without changing it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from leeway.errors import NotFoundError
from leeway.types import GroupState, TrajectoryFailure, WriteItem
from replay_buffer.rules.transitions import StepsCommitted
from replay_buffer.storage import directory as storage_module
from replay_buffer.storage.index import Index
from replay_buffer.storage.index_file import FILE, Filter
from replay_buffer.storage.offline import open_directory
from replay_buffer.storage.records import Record, encode
from replay_buffer.storage.segments import HEADER, frame, locations_of, segment_numbers, segment_path
from replay_buffer.storage.snapshots import (
    read_generation,
    read_snapshot,
    snapshot_path,
    snapshot_positions,
    write_snapshot,
)
from replay_buffer.storage.verification import verify
from tests.harness.replay_builders import RUN, chunk, described
from tests.harness.replay_directory import opened


@pytest.fixture(autouse=True)
def snapshot_at_each_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "_AMPLIFICATION", 0)


async def grown(directory: Path, steps: int = 8, *, cleanly: bool = True, retain_bytes: int | None = None) -> object:
    async with opened(directory, cleanly=cleanly, retain_bytes=retain_bytes) as run:
        await run.open_run()
        for step in range(1, steps + 1):
            await run.step(oldest_kept_step=max(step - 2, 1))
        tickets, *_ = await run.buffer.acquire_tickets(RUN, "s0", run.state.head, 4, 0)
        failure = TrajectoryFailure("too long", retryable=False)
        run.buffer.write(RUN, [WriteItem(tickets[0].members[0].trajectory_id, 1, 0, failure)])
        run.buffer.write(RUN, [WriteItem(tickets[1].members[0].trajectory_id, 1, 0, chunk([run.state.head]))])
        await run.log.durable()
        return described(run.state)


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("retain_bytes", [None, 0])
@pytest.mark.parametrize("cleanly", [True, False])
async def test_a_good_directory_is_found_good_and_left_alone(
    tmp_path: Path, retain_bytes: int | None, *, cleanly: bool
) -> None:
    await grown(tmp_path, cleanly=cleanly, retain_bytes=retain_bytes)
    before = files(tmp_path)
    report = verify(tmp_path)
    assert report.problems == []
    assert report.segments == len(segment_numbers(tmp_path))
    assert report.snapshots == len(snapshot_positions(tmp_path)) > 1
    assert report.index_entries >= 4
    assert report.closes >= 8
    changed = {name for name, data in files(tmp_path).items() if before.get(name) != data}
    assert not {name for name in changed if not name.startswith(FILE)}


async def test_beside_a_running_buffer(tmp_path: Path) -> None:
    async with opened(tmp_path) as run:
        await run.open_run()
        for _ in range(6):
            await run.step()
        assert verify(tmp_path).problems == []
        directory = open_directory(tmp_path)
        assert described(directory.run()) == described(run.state)
        directory.close()
        await run.step()


def damage_record(directory: Path) -> str:
    path = segment_path(directory, 2)
    data = bytearray(path.read_bytes())
    data[HEADER.size + 3] ^= 1
    path.write_bytes(data)
    return r"segment-00000002\.log: the record at byte 0 is damaged"


def lose_segment(directory: Path) -> str:
    segment_path(directory, 3).unlink()
    return r"segment-00000003\.log is missing"


def damage_snapshot(directory: Path) -> str:
    path = snapshot_path(directory, snapshot_positions(directory)[1])
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return f"{path.name}: fails its checksum"


def forge_snapshot(directory: Path) -> str:
    """Whole, but wrong: one consumed group too many."""
    position = snapshot_positions(directory)[1]
    snapshot = read_snapshot(directory, position)
    snapshot.runs[0].consumed += 1
    write_snapshot(directory, snapshot)
    return f"{snapshot_path(directory, position).name}: differs from what the log says"


def forge_index(directory: Path) -> str:
    """A whole entry of another group."""
    file = sqlite3.connect(directory / FILE)
    (first,) = file.execute("SELECT body FROM groups WHERE created = 1").fetchone()
    (checksum,) = file.execute("SELECT checksum FROM groups WHERE created = 1").fetchone()
    file.execute("UPDATE groups SET body = ?, checksum = ? WHERE created = 3", (first, checksum))
    file.commit()
    file.close()
    return "from groups 3 of run 'test-run' on it differs"


def shorten_index(directory: Path) -> str:
    file = sqlite3.connect(directory / FILE)
    file.execute("DELETE FROM groups WHERE created = 3")
    file.commit()
    file.close()
    return r"from groups \d of run 'test-run' on it differs"


def damage_index(directory: Path) -> str:
    file = sqlite3.connect(directory / FILE)
    file.execute("UPDATE groups SET body = substr(body, 1, 20) WHERE created = 2")
    file.commit()
    file.close()
    return "an entry fails its checksum"


def break_history(directory: Path) -> str:
    """A record that is whole but makes no sense."""
    path = segment_path(directory, segment_numbers(directory)[-1])
    with path.open("ab") as file:
        file.write(frame(*encode(Record(RUN, 0, StepsCommitted(5000)))))
    return "does not follow from what came before"


def damage_generation(directory: Path) -> str:
    path = directory / "generation"
    path.write_bytes(path.read_bytes()[:-1])
    return "generation: fails its checksum"


@pytest.mark.parametrize(
    "spoil",
    [
        damage_record,
        lose_segment,
        damage_snapshot,
        forge_snapshot,
        forge_index,
        shorten_index,
        damage_index,
        break_history,
        damage_generation,
    ],
)
async def test_damage_is_found_and_named(tmp_path: Path, spoil: Callable[[Path], str]) -> None:
    await grown(tmp_path)
    expected = spoil(tmp_path)
    problems = verify(tmp_path).problems
    with pytest.raises(AssertionError, match=expected):
        assert not problems, problems


async def test_a_torn_tail_is_a_note(tmp_path: Path) -> None:
    await grown(tmp_path, cleanly=False)
    path = segment_path(tmp_path, segment_numbers(tmp_path)[-1])
    size_bytes = path.stat().st_size
    with path.open("ab") as file:
        file.write(b"\x40\0\0\0torn")
    report = verify(tmp_path)
    assert (report.problems, report.torn_bytes) == ([], 8)
    assert "no whole record" in report.notes[0]
    assert path.stat().st_size == size_bytes + 8, "verifying changes nothing"
    open_directory(tmp_path).close()
    assert path.stat().st_size == size_bytes + 8


@pytest.mark.parametrize("index", ["there", "gone", "damaged"])
async def test_an_opened_directory_shows_what_a_buffer_would(tmp_path: Path, index: str) -> None:
    before = await grown(tmp_path)
    if index == "gone":
        (tmp_path / FILE).unlink()
    if index == "damaged":
        (tmp_path / FILE).write_bytes(b"nonsense" * 4096)
    directory = open_directory(tmp_path)
    try:
        assert described(directory.run()) == before
        dropped = list(directory.select(directory.run(), Filter(state=GroupState.DROPPED)))
        assert [group.drop_message.endswith("too long") for group in dropped] == [True]
        newest = list(directory.select(directory.run(), Filter(), 2))
        assert [group.created for group in newest] == sorted(group.created for group in newest)
        _, group, member = directory.find(f"{RUN}-g3.1")
        assert (group.group_id, member) == (f"{RUN}-g3", 1)
        assert directory.reader.read(locations_of(group.members[0])[0])
        with pytest.raises(NotFoundError, match="no group or trajectory 'x'"):
            directory.find("x")
        with pytest.raises(NotFoundError, match="no run 'x'; there are: test-run"):
            directory.run("x")
    finally:
        directory.close()


def test_what_is_no_log_is_said_to_be_none(tmp_path: Path) -> None:
    for call in (verify, open_directory):
        with pytest.raises(NotFoundError, match="holds no log"):
            call(tmp_path / "nothing")


async def test_a_read_only_index_writes_nothing(tmp_path: Path) -> None:
    await grown(tmp_path)
    generation = read_generation(tmp_path)
    assert generation is not None
    before = files(tmp_path)
    index = Index(tmp_path / FILE, read_only=True)
    complete_to = index.complete_to(generation.id)
    assert complete_to is not None
    group = index.get(RUN, 1)
    assert group is not None
    index.put(RUN, group)
    index.close()
    assert files(tmp_path) == before
