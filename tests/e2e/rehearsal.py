"""examples/rehearsal.toml in small, under fire: killed processes, delayed messages, and what is left afterwards.

supervisor ──> replay buffer, learner, two servers          their [network] names the proxy as the buffer's address
    │ journal lines           ▲
    ▼                         │ SIGKILL
KillPlan <── events ── recording proxy <── ghosts: messages of the fenced, once more
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from leeway.cli.replay_access import open_replay
from leeway.cli.serve import serve_command
from leeway.cli.supervisor import Outcome, Service, Supervisor
from leeway.config import load_configuration
from leeway.v1 import replay_pb2, replay_pb2_grpc
from tests.deadlines import WAIT_SECONDS
from tests.harness.oracle import Evidence
from tests.harness.recording_proxy import Call, Fate, Record, Weather, Write, recording_proxy

EXAMPLE = Path(__file__).parents[2] / "examples" / "rehearsal.toml"
STEPS = 40
SMALL = (
    "run.name=rehearsal",
    f"run.steps={STEPS}",
    "run.groups_per_step=4",
    "run.members=2",
    "run.max_staleness=2",
    "sampling.max_tokens=24",
    "evaluation.every_steps=20",
    "evaluation.tasks=4",
    "evaluation.members=1",
    # A server takes on two groups, which last a step: every kill finds both servers at work.
    "inference_server.worker.prefetch=0",
    "inference_server.arithmetic.max_concurrency=4",
    "inference_server.arithmetic.token_seconds=0.004",
    "inference_server.arithmetic.chunk_tokens=4",
    "learner.checkpoint_every_steps=7",
)


_GHOST_SECONDS = 5.0


@dataclass(frozen=True)
class KillPoint:
    """Once the journal has reached `step`, kill at the next `event`, if it is the victim's own when that is a server.

    "line" is the journal line itself.
    """

    step: int
    event: str


@dataclass
class KillPlan:
    """Kills one service, again and again."""

    victim: str
    points: deque[KillPoint]
    supervisor: Supervisor | None = None
    step: int = 0
    kills: int = 0

    def on_event(self, event: str, subject: Call | Write | None = None) -> None:
        if not self.points or self.step < self.points[0].step or event != self.points[0].event:
            return
        if subject is not None and self.victim.startswith("server") and _server_of(subject) != self.victim:
            return
        assert self.supervisor is not None
        process_id = self.supervisor.process_id(self.victim)
        if process_id is not None:
            os.kill(process_id, signal.SIGKILL)
            self.points.popleft()
            self.kills += 1

    def on_journal_line(self, line: str) -> None:
        self.step = max(self.step, _step_of(line))
        self.on_event("line")


@dataclass
class Ghosts:
    """What a network may do: messages of a fenced learner or worker arrive again, late."""

    address: str
    record: Record
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def on_event(self, event: str, subject: Call | Write) -> None:
        if not isinstance(subject, Call):
            return
        if event == "OpenRun.ended":
            self._start(self._learner(subject.reply.epoch))
        elif event == "AcquireTickets.ended":
            for ticket in subject.reply.tickets:
                if ticket.attempt > 1:
                    self._start(self._worker(ticket))

    async def settle(self) -> None:
        if self.tasks:
            await asyncio.wait(self.tasks)

    def _start(self, ghost: Any) -> None:
        self.tasks.add(asyncio.create_task(ghost))

    async def _learner(self, epoch: int) -> None:
        """The last of each call that earlier epochs made."""
        async with grpc.aio.insecure_channel(self.address) as channel:
            stub: Any = replay_pb2_grpc.ReplayServiceStub(channel)
            for method in ("Advance", "Commit", "DrawBatch"):
                old = [call for call in self.record.of(method) if call.request.epoch < epoch]
                if not old:
                    continue
                with contextlib.suppress(grpc.aio.AioRpcError):
                    call = getattr(stub, method)(old[-1].request, timeout=_GHOST_SECONDS)
                    if method == "DrawBatch":
                        _ = [reply async for reply in call]
                    else:
                        await call

    async def _worker(self, ticket: replay_pb2.Ticket) -> None:
        """Everything that was acknowledged of an earlier attempt at the ticket's trajectories."""
        lent = {member.trajectory_id for member in ticket.members}
        items = [
            write.item
            for write in self.record.writes
            if write.acknowledged and write.item.trajectory_id in lent and write.item.attempt < ticket.attempt
        ]

        async def requests() -> AsyncIterator[replay_pb2.WriteTrajectoriesRequest]:
            yield replay_pb2.WriteTrajectoriesRequest(run="rehearsal", server_id="ghost", items=items)

        async with grpc.aio.insecure_channel(self.address) as channel:
            stub: Any = replay_pb2_grpc.ReplayServiceStub(channel)
            with contextlib.suppress(grpc.aio.AioRpcError):
                _ = [reply async for reply in stub.WriteTrajectories(requests(), timeout=_GHOST_SECONDS)]


class SlowSteps(Weather):
    """Until something has happened every step takes a while, so that the run does not end before."""

    def __init__(self, happened: Callable[[], bool], step_seconds: float = 1.0) -> None:
        self._happened = happened
        self._step_seconds = step_seconds

    async def request(self, method: str, first: bool) -> Fate:
        if method == "Advance" and not self._happened():
            await asyncio.sleep(self._step_seconds)
        return await super().request(method, first)


async def happened(event: asyncio.Event) -> None:
    """Wait, but not for ever: what is asserted afterwards says that it did not happen."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(WAIT_SECONDS):
            await event.wait()
    event.set()


async def rehearse(
    directory: Path,
    victim: str,
    points: Sequence[KillPoint],
    overrides: Sequence[str] = (),
    listeners: Sequence[Callable[[str, Call | Write], None]] = (),
    backends: Sequence[str] = (),
    weather: Weather | None = None,
) -> tuple[Outcome, KillPlan, list[str], Evidence]:
    """Run under fire; returns how it ended, the plan, the supervisor's events, and the evidence.

    With addresses of `backends` the servers are workers that feed the run from them. `weather` is a fair one otherwise.
    """
    overrides = [*SMALL, f"run.directory={directory}", *overrides]
    configuration = load_configuration(EXAMPLE, overrides).with_free_ports()
    network = configuration.network
    run_directory = directory / "rehearsal"
    run_directory.mkdir()
    config = run_directory / "config.toml"
    record, plan, events = Record(), KillPlan(victim, deque(points)), list[str]()
    async with recording_proxy(network.replay_buffer, record, weather) as address:
        ghosts = Ghosts(address, record)
        record.listeners += [plan.on_event, ghosts.on_event, *listeners]
        proxied = network.model_copy(update={"replay_buffer": address})
        configuration.model_copy(update={"network": proxied}).write(config)
        arguments = ("--config", str(config), "--supervised")
        plan.supervisor = Supervisor(
            replay_buffer=Service(
                "replay-buffer",
                serve_command("replay-buffer", *arguments, f"--set=network.replay_buffer={network.replay_buffer}"),
            ),
            learner=Service("learner", serve_command("learner", *arguments)),
            servers=[
                Service(f"server-{i}", serve_command("inference-server", *_place(i, backends), *arguments))
                for i in range(2)
            ],
            learner_stop_seconds=WAIT_SECONDS,
            log_directory=run_directory / "logs",
            on_journal_line=plan.on_journal_line,
            on_event=events.append,
        )
        outcome = await plan.supervisor.run(asyncio.Event())
        await ghosts.settle()
    async with open_replay(config) as client:
        groups = [group async for group in client.export_groups()]
        evidence = Evidence(record, groups, await client.run_status(), run_directory)
    return outcome, plan, events, evidence


def _place(index: int, backends: Sequence[str]) -> tuple[str, ...]:
    """A server's own arguments."""
    return ("--index", str(index), *(("--backend", backends[index]) if backends else ()))


def _server_of(subject: Call | Write) -> str:
    return subject.server_id if isinstance(subject, Write) else subject.request.server_id


def _step_of(line: str) -> int:
    return int(json.loads(line)["step"])
