"""Whatever is damaged of the index, a start makes it anew and knows what it knew; while running, the service ends."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import replay_buffer.storage.index
from leeway import codec
from leeway.types import DropReason
from leeway.v1 import replay_pb2
from replay_buffer.rules.opening import decide_rollback
from replay_buffer.storage.index_file import FILE, connect
from replay_buffer.storage.log import LogFailedError
from tests.harness.handler_calls import Harness
from tests.harness.replay_builders import ROOT, RUN, filled, snapshot, spec, version
from tests.harness.replay_directory import opened

_PAGE_BYTES = 4096


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A log whose groups have ended, and their index."""
    harness = Harness(tmp_path / "honest")
    message = codec.spec_to_proto(spec(groups_per_step=60, members=1, max_staleness=0))
    harness.call("OpenRun", replay_pb2.OpenRunRequest(spec=message, checkpoint=message.root))
    asked = replay_pb2.AcquireTicketsRequest(run=RUN, server_id="s", version=message.root, max_members=1000)
    tickets = [codec.ticket_from_proto(ticket) for ticket in harness.call("AcquireTickets", asked).tickets]
    items = [codec.item_to_proto(item) for ticket in tickets for item in filled(ticket, [ROOT])]
    harness.write([replay_pb2.WriteTrajectoriesRequest(run=RUN, server_id="s", items=items)])
    harness.call("FinishRun", replay_pb2.FinishRunRequest(run=RUN, epoch=1))
    harness.close()
    harness.loop.close()
    with closing(sqlite3.connect(tmp_path / "honest" / FILE)) as index:
        index.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return tmp_path / "honest"


def test_a_damaged_page_is_never_met_by_a_write(directory: Path, tmp_path: Path) -> None:
    exported = _exported(directory)
    pages = (directory / FILE).stat().st_size // _PAGE_BYTES
    assert pages > 3
    for page in range(pages):
        copy = tmp_path / f"page-{page}"
        shutil.copytree(directory, copy)
        with (copy / FILE).open("r+b") as file:
            file.seek(page * _PAGE_BYTES)
            file.write(b"\x5a" * _PAGE_BYTES)
        assert _exported(copy) == exported


def test_names_that_are_no_text_any_more_are_damage(directory: Path) -> None:
    exported = _exported(directory)
    data = (directory / FILE).read_bytes()
    assert b"CREATE TABLE groups (" in data
    (directory / FILE).write_bytes(data.replace(b"CREATE TABLE groups (", b"CREATE TABLE groups \xcc"))
    assert _exported(directory) == exported


def test_damage_that_only_a_deletion_meets_is_met_by_the_start(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    exported = _exported(directory)  # and a snapshot to start from
    damaged: list[Path | None] = []

    class Malformed(sqlite3.Connection):
        def execute(self, sql: str, parameters: Any = ()) -> sqlite3.Cursor:
            if sql.startswith("DELETE FROM groups WHERE (ended_segment"):
                raise sqlite3.DatabaseError("database disk image is malformed")
            return super().execute(sql, parameters)

    def connect_once(path: Path | None, **how: Any) -> sqlite3.Connection:
        if damaged:
            return connect(path, **how)
        damaged.append(path)
        assert path is not None
        return sqlite3.connect(path, check_same_thread=False, factory=Malformed)

    monkeypatch.setattr(replay_buffer.storage.index, "connect", connect_once)
    assert _exported(directory) == exported
    assert damaged, "the planted damage was met"
    assert "malformed" in caplog.text


def _exported(directory: Path) -> list[replay_pb2.ExportGroupsResponse]:
    harness = Harness(directory)
    try:
        return harness.call("ExportGroups", replay_pb2.ExportGroupsRequest(run=RUN))
    finally:
        harness.close()
        harness.loop.close()


def _damage(directory: Path, statement: str) -> None:
    with closing(sqlite3.connect(directory / FILE)) as index, index:
        index.execute(statement)


ENTRY = "UPDATE groups SET body = zeroblob(length(body))"


async def _three_steps(directory: Path) -> dict[str, object]:
    """A run of three committed steps, of which the last two can be rolled back."""
    async with opened(directory) as running:
        await running.open_run()
        for step in range(3):
            await running.step(oldest_kept_step=min(step, 1))
        return snapshot(running.state)


async def test_damage_that_is_met_in_the_middle_of_a_decision_ends_the_service_with_a_line_that_helps(
    tmp_path: Path,
) -> None:
    before = await _three_steps(tmp_path)
    async with opened(tmp_path) as running:
        _damage(tmp_path, ENTRY)
        with pytest.raises(LogFailedError, match=r"\.sqlite: an entry fails its checksum; .*; start the"):
            await running.buffer.renew_leases(RUN, [("test-run-g1", 1)])
        with pytest.raises(LogFailedError):
            await running.log.wait_failed()
        with pytest.raises(LogFailedError):  # nothing is answered any more
            await running.buffer.status(RUN)
        with pytest.raises(LogFailedError):
            await running.buffer.finish_run(RUN, 1)
        assert not (tmp_path / FILE).exists()
    async with opened(tmp_path) as again:
        assert snapshot(again.state) == before
        assert await again.buffer.renew_leases(RUN, [("test-run-g1", 1)]) == []


async def test_damage_that_is_met_while_a_record_is_applied_ends_the_service_and_the_record_counts(
    tmp_path: Path,
) -> None:
    """The record of the rollback is in the log, and a part of what it does could not be done."""
    await _three_steps(tmp_path)
    async with opened(tmp_path) as running:
        decided = decide_rollback(running.state, version(1))
        assert decided is not None
        _damage(tmp_path, ENTRY)
        with pytest.raises(LogFailedError):
            running.buffer._store.record(RUN, decided)
        with pytest.raises(LogFailedError):
            await running.buffer.status(RUN)
    async with opened(tmp_path) as again:
        assert again.state.head == version(1)
        assert again.state.dropped[DropReason.ROLLED_BACK] == len(decided.group_ids)
        assert {again.state.groups[group_id].drop_reason for group_id in decided.group_ids} == {DropReason.ROLLED_BACK}


async def test_damage_that_a_start_meets_is_gone_with_the_next_one(tmp_path: Path) -> None:
    """The file is whole, one entry is not, and a record behind the snapshot is about it."""
    await _three_steps(tmp_path)
    async with opened(tmp_path, cleanly=False) as running:
        await running.buffer.rollback_run(RUN, version(1))
        after = snapshot(running.state)
    _damage(tmp_path, ENTRY)
    with pytest.raises(LogFailedError, match="start the replay buffer again"):
        async with opened(tmp_path):
            pass
    async with opened(tmp_path) as again:
        assert snapshot(again.state) == after
