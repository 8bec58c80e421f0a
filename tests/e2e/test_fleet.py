"""Servers come and go during a run, and one of them lies about its weights: it is named and taken out."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from leeway.cli.main import main
from leeway.service.ports import free_port
from leeway.types import DropReason, GroupState, Purpose
from tests.deadlines import WAIT_SECONDS
from tests.e2e.rehearsal import happened, rehearse
from tests.harness.oracle import Oracle
from tests.harness.recording_proxy import Call, Fate, Weather, Write

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

STEPS = 80
_SERVER = ("leeway.cli.main", "serve", "inference-server")
JOIN_AT_STEP = 4
ENOUGH_CLOSES = 6
"""Trajectories of a server after which it may go."""


class HonestOnly(Oracle):
    """Tokens of the lying server need not be what their labels say; everything else holds for it, too."""

    legal_drops: ClassVar = {
        Purpose.TRAIN: Oracle.legal_drops[Purpose.TRAIN] | {DropReason.DIVERGED},
        Purpose.EVAL: Oracle.legal_drops[Purpose.EVAL],
    }

    def true(self) -> Iterator[str]:
        lies = {name for name, (_, record) in self.trajectories.items() if record.server_id == "odd"}
        return (line for line in super().true() if line.partition(":")[0] not in lies or "was to start from" in line)


class Visitors(Weather):
    """Servers that the configuration does not list, each a process of its own.

    late     joins and stays
    leaver   joins, works, and gets SIGTERM
    mortal   joins, works, and gets SIGKILL
    odd      joins through a backend that serves stale weights under new labels

    However long that takes, the run waits until all of them ask for work, until the leaver has said that it goes, and
    until the odd one has been told that it is drained.
    """

    def __init__(self, directory: Path) -> None:
        self.asking: set[str] = set()
        self.all_ask, self.left, self.told = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.drained = False
        self.config = directory / "rehearsal" / "config.toml"
        self.logs = directory
        self.processes: dict[str, asyncio.subprocess.Process] = {}
        self.starting: list[asyncio.Task[None]] = []
        self.closed: Counter[str] = Counter()
        self.gone: set[str] = set()

    async def request(self, method: str, first: bool) -> Fate:
        if method == "DrawBatch" and self.starting:
            await happened(self.all_ask)
            if "leaver" in self.gone:
                await happened(self.left)
            if self.drained:
                await happened(self.told)
        return Fate.ARRIVES

    def on_event(self, event: str, subject: Call | Write) -> None:
        if isinstance(subject, Call):
            self._on_call(event, subject)
        elif event == "write.answered":
            self.closed[subject.server_id] += subject.item.WhichOneof("content") == "close"
            for name, number in (("leaver", signal.SIGTERM), ("mortal", signal.SIGKILL)):
                if self.closed[name] >= ENOUGH_CLOSES and name not in self.gone:
                    self.gone.add(name)
                    self.processes[name].send_signal(number)

    def _on_call(self, event: str, call: Call) -> None:
        if event == "Advance.ended" and not self.starting and call.request.version.step >= JOIN_AT_STEP:
            self.starting = [asyncio.create_task(self._start())]
        elif event == "AcquireTickets.begun":
            self.asking.add(call.request.server_id)
            if self.asking >= {"late", "leaver", "mortal", "odd"}:
                self.all_ask.set()
        elif event == "LeaveRun.ended" and call.request.server_id == "leaver":
            self.left.set()
        elif event == "DrainServer.ended":
            self.drained = call.succeeded
        elif event == "AcquireTickets.ended" and call.request.server_id == "odd" and call.reply.HasField("drained"):
            self.told.set()

    async def _start(self) -> None:
        for name in ("late", "leaver", "mortal"):
            await self._run(name, *_SERVER, "--config", str(self.config), "--join", name)
        address = f"127.0.0.1:{free_port('127.0.0.1')}"
        await self._run("backend", "tests.e2e.stale_backend", "--address", address, "--run", "rehearsal")
        arguments = ("--config", str(self.config), "--join", "odd", "--backend", address)
        await self._run("odd", *_SERVER, *arguments)

    async def _run(self, name: str, *argv: str) -> None:
        with (self.logs / f"{name}.log").open("wb") as log_file:
            self.processes[name] = await asyncio.create_subprocess_exec(
                sys.executable, "-m", *argv, stdin=asyncio.subprocess.DEVNULL, stdout=log_file, stderr=log_file
            )

    async def ended(self) -> dict[str, int]:
        """Exit codes; the backend is stopped, the others have to end by themselves."""
        self.processes["backend"].terminate()
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                return {name: await process.wait() for name, process in self.processes.items()}
        finally:
            for process in self.processes.values():
                if process.returncode is None:
                    process.kill()


async def test_servers_join_leave_die_and_lie(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    visitors = Visitors(tmp_path)
    overrides = (
        f"run.steps={STEPS}",
        f"learner.draw_timeout_seconds={4 * WAIT_SECONDS}",
        "inference_server.worker.drain_seconds=60",  # the leaver's last words may take their time
        "replay_buffer.lease_seconds=3",
        "learner.fleet.min_tokens=200",
        f"learner.fleet.window_steps={STEPS}",  # however little comes of the liar in each step
    )
    try:
        outcome, _, _, evidence = await rehearse(
            tmp_path, "nobody", [], overrides, [visitors.on_event], weather=visitors
        )
    finally:
        codes = await visitors.ended() if visitors.processes else {}
    assert outcome.error == ""
    assert codes == {"late": 0, "leaver": 0, "mortal": -signal.SIGKILL, "backend": 0, "odd": 0}
    assert HonestOnly(evidence).violations() == []

    trained = Counter(
        trajectory.server_id
        for group in evidence.groups
        if group.state is GroupState.CONSUMED and group.purpose is Purpose.TRAIN
        for trajectory in group.trajectories
    )
    assert {"server-0", "server-1", "late", "leaver", "mortal"} <= trained.keys()

    # It is named, in the summary, by the command and to itself; and it got nothing more.
    summary = json.loads((evidence.run_directory / "summary.json").read_text())
    assert summary["finished"]
    assert summary["steps"] == STEPS
    (drained,) = summary["drained_servers"]
    assert (drained["server"], drained["reason"]) == ("odd", "diverging")
    assert "nats per token further from the learner's" in drained["message"]
    drains = evidence.record.of("DrainServer")
    assert [(call.request.server_id, call.request.epoch) for call in drains] == [("odd", 1)]
    after = [call for call in evidence.record.of("AcquireTickets") if call.begun > (drains[0].ended or 0)]
    assert any(call.request.server_id == "odd" and call.reply.HasField("drained") for call in after)
    assert not any(call.request.server_id == "odd" and call.reply.tickets for call in after)
    assert "server odd is drained (diverging)" in (tmp_path / "odd.log").read_text()
    assert await asyncio.to_thread(main, ["fleet", "ls", str(evidence.run_directory)]) == 0
    assert "drained (diverging), gone" in capsys.readouterr().out

    # Who leaves says so, after its last write; what it held was lent to others.
    (left,) = [call for call in evidence.record.of("LeaveRun") if call.request.server_id == "leaver"]
    writes = [write for write in evidence.record.writes if write.server_id == "leaver"]
    assert all(write.sent < left.begun for write in writes)
