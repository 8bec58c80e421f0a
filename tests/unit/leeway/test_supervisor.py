"""How a run's processes are restarted, and how they end."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from leeway.cli import supervisor
from leeway.cli.supervisor import Outcome, Service, Supervisor
from leeway.service import children
from leeway.service.process import RUN_FINISHED
from tests.deadlines import WAIT_SECONDS

pytestmark = pytest.mark.processes

STUBBORN = (sys.executable, "-m", "tests.unit.leeway.stubborn")
FOREVER = ("sleep", "600")


def supervised(
    folder: Path, *, buffer: tuple[str, ...], learner: tuple[str, ...], server: tuple[str, ...] | None = None
) -> tuple[Supervisor, list[str]]:
    events: list[str] = []
    made = Supervisor(
        replay_buffer=Service("replay-buffer", buffer),
        learner=Service("learner", learner),
        servers=[] if server is None else [Service("server-0", server)],
        learner_stop_seconds=WAIT_SECONDS,
        log_directory=folder / "logs",
        on_journal_line=lambda _: None,
        on_event=events.append,
    )
    return made, events


async def test_what_a_killed_process_had_started_ends_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "OTHERS_STOP_SECONDS", 0.01)
    monkeypatch.setattr(children, "PIPES_SECONDS", 2 * WAIT_SECONDS)
    fifo = str(tmp_path / "here")
    os.mkfifo(fifo)
    run, _ = supervised(tmp_path, buffer=(*STUBBORN, fifo), learner=(*STUBBORN, fifo, "wait"))
    async with asyncio.timeout(WAIT_SECONDS):
        assert await run.run(asyncio.Event()) == Outcome()
    assert run.process_id("replay-buffer") is None


@pytest.mark.parametrize("name", ["replay-buffer", "server-0"])
async def test_a_service_that_exits_0_before_the_run_has_ended_is_named_and_started_again(
    tmp_path: Path, name: str
) -> None:
    """It ends at once the first time; the learner ends when it has been started a second time."""
    fifo = tmp_path / "again"
    os.mkfifo(fifo)
    quits = (
        "sh",
        "-c",
        f'test -e "{tmp_path}/first" && {{ echo > "{fifo}"; exec sleep 600; }}; : > "{tmp_path}/first"',
    )
    services = {"replay-buffer": FOREVER, "server-0": FOREVER} | {name: quits}
    run, events = supervised(
        tmp_path, buffer=services["replay-buffer"], learner=("cat", str(fifo)), server=services["server-0"]
    )
    async with asyncio.timeout(WAIT_SECONDS):
        assert await run.run(asyncio.Event()) == Outcome()
    assert events == [f"{name} exited with code 0 before the run had ended; starting it again in 0.25 s"]


async def test_exits_with_0_count_as_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_FIRST_PAUSE_SECONDS", 0.0)
    run, events = supervised(tmp_path, buffer=("echo", "my own module"), learner=FOREVER)
    async with asyncio.timeout(WAIT_SECONDS):
        outcome = await run.run(asyncio.Event())
    assert outcome == Outcome("replay-buffer ended 11 times within 120 s; its last line: my own module")
    assert len(events) == 10


async def test_a_server_whose_run_has_finished_is_not_started_again(tmp_path: Path) -> None:
    fifo = tmp_path / "ended"
    os.mkfifo(fifo)
    run, events = supervised(
        tmp_path,
        buffer=FOREVER,
        learner=("sh", "-c", f'cat "{fifo}"; sleep 1'),
        server=("sh", "-c", f'echo "{RUN_FINISHED}"; echo > "{fifo}"'),
    )
    async with asyncio.timeout(WAIT_SECONDS):
        assert await run.run(asyncio.Event()) == Outcome()
    assert events == []
