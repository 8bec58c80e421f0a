"""The end of a run does not hang on what its processes leave behind."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from leeway.cli import supervisor
from leeway.cli.supervisor import Outcome, Service, Supervisor
from tests.deadlines import WAIT_SECONDS

MODULE = "tests.unit.leeway.stubborn"


async def test_what_a_killed_process_had_started_ends_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "OTHERS_STOP_SECONDS", 0.01)
    monkeypatch.setattr(supervisor, "_KILLED_SECONDS", 2 * WAIT_SECONDS)
    os.mkfifo(tmp_path / "here")
    supervised = Supervisor(
        replay_buffer=Service("replay-buffer", (MODULE, str(tmp_path / "here"))),
        learner=Service("learner", (MODULE, str(tmp_path / "here"), "wait")),
        servers=[],
        learner_stop_seconds=WAIT_SECONDS,
        log_directory=tmp_path,
        on_journal_line=lambda _: None,
        on_event=lambda _: None,
    )
    async with asyncio.timeout(WAIT_SECONDS):
        assert await supervised.run(asyncio.Event()) == Outcome()
    assert supervised.process_id("replay-buffer") is None
