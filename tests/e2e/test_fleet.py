"""Servers come and go during a run, and one of them lies about its weights: it is named and taken out."""

from __future__ import annotations

import asyncio
import json
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from leeway.cli.main import main
from leeway.cli.serve import serve_command
from leeway.service.ports import free_port
from leeway.types import DropReason, GroupState, Purpose
from tests.deadlines import WAIT_SECONDS
from tests.e2e.rehearsal import Visitors, happened, rehearse
from tests.harness.oracle import Oracle
from tests.harness.processes import module
from tests.harness.recording_proxy import Call, Fate, Write

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

STEPS = 80
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


class Guests(Visitors):
    """Four servers that join.

    late     joins and stays
    leaver   joins, works, and gets SIGTERM; the run waits until it has said that it leaves
    mortal   joins, works, and gets SIGKILL
    odd      joins through a backend that serves stale weights under new labels
    """

    def __init__(self, directory: Path) -> None:
        config = str(directory / "rehearsal" / "config.toml")
        self._address = f"127.0.0.1:{free_port('127.0.0.1')}"
        commands = {
            name: serve_command("inference-server", "--config", config, "--join", name)
            for name in ("late", "leaver", "mortal")
        }
        worker = serve_command("inference-server", "--config", config, "--join", "odd", "--backend", self._address)
        super().__init__(directory, commands | {"odd": worker}, JOIN_AT_STEP)
        self._left = asyncio.Event()
        self._closed: Counter[str] = Counter()
        self._gone: set[str] = set()

    async def request(self, method: str, first: bool) -> Fate:
        fate = await super().request(method, first)
        if method == "DrawBatch" and "leaver" in self._gone:
            await happened(self._left)
        return fate

    def on_event(self, event: str, subject: Call | Write) -> None:
        super().on_event(event, subject)
        if isinstance(subject, Call):
            if event == "LeaveRun.ended" and subject.request.server_id == "leaver":
                self._left.set()
        elif event == "write.answered":
            self._closed[subject.server_id] += subject.item.WhichOneof("content") == "close"
            for name, number in (("leaver", signal.SIGTERM), ("mortal", signal.SIGKILL)):
                if self._closed[name] >= ENOUGH_CLOSES and name not in self._gone:
                    self._gone.add(name)
                    self.processes[name].send_signal(number)

    async def _start(self) -> None:
        stale = ("--address", self._address, "--run", "rehearsal", "--stale", "--set", "max_concurrency=4")
        slow = ("--set", "token_seconds=0.02", "--set", "chunk_tokens=4")
        await self.start("backend", module("tests.harness.arithmetic_backend", *stale, *slow))
        await super()._start()

    async def ended(self) -> dict[str, int]:
        """Exit codes; the backend is stopped, the others have to end by themselves."""
        if "backend" in self.processes:
            self.processes["backend"].terminate()
        return await super().ended()


async def test_servers_join_leave_die_and_lie(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guests = Guests(tmp_path)
    overrides = (
        f"run.steps={STEPS}",
        f"learner.draw_timeout_seconds={4 * WAIT_SECONDS}",
        "inference_server.worker.drain_seconds=60",  # the leaver's last call may take long
        "replay_buffer.lease_seconds=3",
        "learner.fleet.min_tokens=200",
        f"learner.fleet.window_steps={STEPS}",  # however little comes of the liar in each step
    )
    try:
        outcome, _, _, evidence = await rehearse(tmp_path, "nobody", [], overrides, [guests.on_event], network=guests)
    finally:
        codes = await guests.ended()
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

    # A server that leaves says so, after its last write.
    (left,) = [call for call in evidence.record.of("LeaveRun") if call.request.server_id == "leaver"]
    writes = [write for write in evidence.record.writes if write.server_id == "leaver"]
    assert all(write.sent < left.begun for write in writes)
