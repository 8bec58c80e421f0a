"""Whatever page of the index is damaged, a start makes it anew and knows what it knew."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from leeway import codec
from leeway.v1 import replay_pb2
from replay_buffer.storage.index import FILE
from tests.model.harness import Harness
from tests.unit.replay_buffer.builders import ROOT, RUN, filled, spec

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


def _exported(directory: Path) -> list[replay_pb2.ExportGroupsResponse]:
    harness = Harness(directory)
    try:
        return harness.call("ExportGroups", replay_pb2.ExportGroupsRequest(run=RUN))
    finally:
        harness.close()
        harness.loop.close()
