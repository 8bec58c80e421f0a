"""A server that never comes to an end holds up the run: it is found by the time of its tickets, drained and named.

Nothing here depends on how fast anybody is: the slow server takes a minute for a token, steps that need its groups are
not drawn, and what it holds grows older until that is far beyond what the others take.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest

from leeway.cli.main import main
from leeway.types import GroupState, Purpose
from tests.deadlines import RUN_SECONDS, WAIT_SECONDS
from tests.e2e.rehearsal import happened, rehearse
from tests.harness.oracle import violations
from tests.harness.recording_proxy import Call, Fate, Weather, Write

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(RUN_SECONDS)]

STEPS = 24
OVERRIDES = (
    f"run.steps={STEPS}",
    # More groups a step than the other two take on at once: some are left for the slow one.
    "run.groups_per_step=6",
    "replay_buffer.lease_seconds=3",
    "learner.fleet.slow_ratio=10",
    "learner.fleet.min_groups=2",
    "learner.fleet.slow_seconds=4",
    "learner.fleet.check_seconds=0.5",
    f"learner.draw_timeout_seconds={2 * WAIT_SECONDS}",
)


class SlowServer(Weather):
    """Joins after the first step. The run waits until it asks for work, and once it is drained, until it is told so."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._asks, self._told = asyncio.Event(), asyncio.Event()
        self._start: asyncio.Task[None] | None = None
        self._drained = False
        self.process: asyncio.subprocess.Process | None = None

    async def request(self, method: str, first: bool) -> Fate:
        if method == "DrawBatch" and self._start is not None:
            await happened(self._asks)
            if self._drained:
                await happened(self._told)
        return Fate.ARRIVES

    def on_event(self, event: str, subject: Call | Write) -> None:
        if event == "Advance.ended" and self._start is None:
            self._start = asyncio.create_task(self._join())
        if not isinstance(subject, Call) or getattr(subject.request, "server_id", "") != "slow":
            return
        if event == "AcquireTickets.begun":
            self._asks.set()
        elif event == "DrainServer.ended":
            self._drained = subject.succeeded
        elif event == "AcquireTickets.ended" and subject.succeeded and subject.reply.HasField("drained"):
            self._told.set()

    async def _join(self) -> None:
        with (self._directory / "slow.log").open("wb") as log_file:
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "inference_server", "--join", "slow"),
                *("--config", str(self._directory / "rehearsal" / "config.toml")),
                "--set=inference_server.arithmetic.token_seconds=60",
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
            )

    async def ended(self) -> int:
        """Its exit code; it has to end with the run."""
        assert self.process is not None
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                return await self.process.wait()
        finally:
            if self.process.returncode is None:
                self.process.kill()


async def test_a_slow_server_is_drained_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow = SlowServer(tmp_path)
    try:
        outcome, _, _, evidence = await rehearse(tmp_path, "nobody", [], OVERRIDES, [slow.on_event], weather=slow)
    finally:
        code = await slow.ended() if slow.process is not None else None
    assert (outcome.error, code) == ("", 0)
    assert violations(evidence) == []

    # It held groups, and others took them over.
    record = evidence.record
    held = {
        ticket.group_id
        for call in record.of("AcquireTickets")
        if call.request.server_id == "slow" and call.succeeded
        for ticket in call.reply.tickets
    }
    assert held
    trained = {
        group.group_id: {trajectory.server_id for trajectory in group.trajectories}
        for group in evidence.groups
        if group.state is GroupState.CONSUMED and group.purpose is Purpose.TRAIN
    }
    assert any(group_id in trained and "slow" not in trained[group_id] for group_id in held)

    # It is named: in the summary, to itself, and by the command.
    summary = json.loads((evidence.run_directory / "summary.json").read_text())
    assert (summary["finished"], summary["steps"]) == (True, STEPS)
    (drained,) = [entry for entry in summary["drained_servers"] if entry["server"] == "slow"]
    assert drained["reason"] == "slow"
    assert "those of the others" in drained["message"]
    (drain,) = [call for call in record.of("DrainServer") if call.request.server_id == "slow"]
    assert drain.succeeded
    after = [call for call in record.of("AcquireTickets") if call.begun > (drain.ended or 0)]
    assert not any(call.request.server_id == "slow" and call.reply.tickets for call in after if call.succeeded)
    assert "server slow is drained (slow)" in (tmp_path / "slow.log").read_text()
    assert await asyncio.to_thread(main, ["fleet", "ls", str(evidence.run_directory)]) == 0
    assert "drained (slow)" in capsys.readouterr().out
