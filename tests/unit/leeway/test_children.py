"""Children answer or end, stop or are killed, and leave nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from leeway.service import children
from leeway.service.children import python_command, running, start
from tests.deadlines import WAIT_SECONDS

pytestmark = pytest.mark.processes

IGNORES_SIGTERM = (
    sys.executable,
    "-c",
    "import signal; signal.signal(15, signal.SIG_IGN); print('here', flush=True); signal.pause()",
)


async def test_lines_come_as_they_are_printed_and_the_last_needs_no_end() -> None:
    out: list[str] = []
    err: list[str] = []
    command = ("sh", "-c", "printf 'a\\n\\nb\\nlast'; echo wrong >&2; exit 3")
    child = await start(command, on_stdout=out.append, on_stderr=err.append)
    async with asyncio.timeout(WAIT_SECONDS):
        assert await child.wait() == 3
    assert (out, err) == (["a", "", "b", "last"], ["wrong"])


async def test_a_child_that_stops_in_time_is_not_killed() -> None:
    async with asyncio.timeout(WAIT_SECONDS), running(("sleep", "600"), WAIT_SECONDS) as child:
        assert await child.stop(WAIT_SECONDS)
    assert child.exit_code == -signal.SIGTERM


async def test_a_child_that_does_not_stop_is_killed() -> None:
    here = asyncio.Event()
    child = await start(IGNORES_SIGTERM, on_stdout=lambda _: here.set())
    async with asyncio.timeout(WAIT_SECONDS):
        await here.wait()
        assert not await child.stop(0.05)
    assert child.exit_code == -signal.SIGKILL


async def test_who_waits_for_an_answer_is_told_when_the_child_ends_first() -> None:
    child = await start(("sh", "-c", "exit 2"))
    async with asyncio.timeout(WAIT_SECONDS):
        assert await child.unless_ended(asyncio.sleep(10 * WAIT_SECONDS, result="an answer")) is None
        assert await child.wait() == 2


async def test_what_an_ended_child_leaves_in_its_group_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "PIPES_SECONDS", 10 * WAIT_SECONDS)
    child = await start(("sh", "-c", "sleep 600 &"), on_stdout=lambda _: None)
    async with asyncio.timeout(WAIT_SECONDS):
        assert await child.wait() == 0  # the other one held its stdout


def test_a_child_hears_by_its_stdin_that_its_parent_is_gone() -> None:
    program = (
        "import asyncio, os\n"
        "from leeway.service.children import start\n"
        "async def main():\n"
        "    await start(['cat'])\n"
        "    os.kill(os.getpid(), 9)\n"
        "asyncio.run(main())\n"
    )
    reading, writing = os.pipe()  # an input of the parent that does not end
    try:
        # Returns when the child, which shares stdout, has ended too.
        done = subprocess.run(
            [sys.executable, "-c", program], stdin=reading, capture_output=True, timeout=WAIT_SECONDS, check=False
        )
    finally:
        os.close(reading)
        os.close(writing)
    assert done.returncode == -signal.SIGKILL


def test_modules_in_the_working_directory_are_not_found(tmp_path: Path) -> None:
    (tmp_path / "leeway.py").write_text("raise SystemExit('shadowed')")
    done = subprocess.run(
        [*python_command("leeway.cli.main"), "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
