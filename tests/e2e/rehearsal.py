"""examples/rehearsal.toml in small: processes are killed, messages arrive late, and the evidence is gathered.

supervisor ──> replay buffer, learner, two servers          their [network] names the proxy as the buffer's address
    │ journal lines           ▲
    ▼                         │ SIGKILL
KillPlan <── events ── recording proxy <── late messages: those of fenced callers, once more
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
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
from tests.harness.processes import ROOT, ended, start
from tests.harness.recording_proxy import Call, Fate, Network, Record, Write, recording_proxy

EXAMPLE = ROOT / "examples" / "rehearsal.toml"
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
    # A server takes on two groups, which last a step: every kill finds both servers busy.
    "inference_server.worker.prefetch=0",
    "inference_server.arithmetic.max_concurrency=4",
    "inference_server.arithmetic.token_seconds=0.004",
    "inference_server.arithmetic.chunk_tokens=4",
    "learner.checkpoint_every_steps=7",
)


_LATE_SECONDS = 5.0


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
class LateMessages:
    """Has messages of a fenced learner or worker arrive again, late, as a network may."""

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

    def _start(self, late: Any) -> None:
        self.tasks.add(asyncio.create_task(late))

    async def _learner(self, epoch: int) -> None:
        """The last of each call that earlier epochs made."""
        async with grpc.aio.insecure_channel(self.address) as channel:
            stub: Any = replay_pb2_grpc.ReplayServiceStub(channel)
            for method in ("Advance", "Commit", "DrawBatch"):
                old = [call for call in self.record.of(method) if call.request.epoch < epoch]
                if not old:
                    continue
                with contextlib.suppress(grpc.aio.AioRpcError):
                    call = getattr(stub, method)(old[-1].request, timeout=_LATE_SECONDS)
                    if method == "DrawBatch":
                        _ = [reply async for reply in call]
                    else:
                        await call

    async def _worker(self, ticket: replay_pb2.Ticket) -> None:
        """Everything that was acknowledged of an earlier attempt at the ticket's trajectories."""
        reissued = {member.trajectory_id for member in ticket.members}
        items = [
            write.item
            for write in self.record.writes
            if write.acknowledged and write.item.trajectory_id in reissued and write.item.attempt < ticket.attempt
        ]

        async def requests() -> AsyncIterator[replay_pb2.WriteTrajectoriesRequest]:
            yield replay_pb2.WriteTrajectoriesRequest(run="rehearsal", server_id="late", items=items)

        async with grpc.aio.insecure_channel(self.address) as channel:
            stub: Any = replay_pb2_grpc.ReplayServiceStub(channel)
            with contextlib.suppress(grpc.aio.AioRpcError):
                _ = [reply async for reply in stub.WriteTrajectories(requests(), timeout=_LATE_SECONDS)]


class SlowSteps(Network):
    """Delays every step until something has happened, so that the run does not end before."""

    def __init__(self, happened: Callable[[], bool], step_seconds: float = 1.0) -> None:
        self._happened = happened
        self._step_seconds = step_seconds

    async def request(self, method: str, first: bool) -> Fate:
        if method == "Advance" and not self._happened():
            await asyncio.sleep(self._step_seconds)
        return await super().request(method, first)


async def happened(event: asyncio.Event) -> None:
    """Wait, but not forever: an assertion afterwards says that it did not happen."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(WAIT_SECONDS):
            await event.wait()
    event.set()


class AllAsk(Network):
    """Training waits until servers have asked for tickets: a batch that is drawn later finds them all at work.

    Args:
        servers: their names.
        holds: whether a draw has to wait at all.
    """

    def __init__(self, servers: Collection[str], holds: Callable[[], bool] = lambda: True) -> None:
        self._missing = set(servers)
        self._holds = holds
        self._all_ask = asyncio.Event()

    async def request(self, method: str, first: bool) -> Fate:
        if method == "DrawBatch" and self._holds():
            await happened(self._all_ask)
        return await super().request(method, first)

    def on_event(self, event: str, subject: Call | Write) -> None:
        if event == "AcquireTickets.begun" and isinstance(subject, Call):
            self._missing.discard(subject.request.server_id)
            if not self._missing:
                self._all_ask.set()


class Visitors(AllAsk):
    """Processes that join a run once it has reached a step, and that the configuration does not list.

    The run waits until all of them ask for tickets, and once one is drained, until that one has been told.

    Args:
        directory: for their logs; the run's folder lies in it.
        commands: by the names of the visiting servers: what each is started with.
        after_step: the step after which they are started.
    """

    def __init__(self, directory: Path, commands: Mapping[str, Sequence[str]], after_step: int) -> None:
        super().__init__(commands, lambda: self._starting is not None)
        self.processes: dict[str, asyncio.subprocess.Process] = {}
        self._directory = directory
        self._commands = commands
        self._after_step = after_step
        self._starting: asyncio.Task[None] | None = None
        self._drained: dict[str, asyncio.Event] = {}

    async def request(self, method: str, first: bool) -> Fate:
        fate = await super().request(method, first)
        if method == "DrawBatch":
            for told in self._drained.values():
                await happened(told)
        return fate

    def on_event(self, event: str, subject: Call | Write) -> None:
        super().on_event(event, subject)
        if isinstance(subject, Write):
            return
        if event == "Advance.ended" and self._starting is None and subject.request.version.step >= self._after_step:
            self._starting = asyncio.create_task(self._start())
        elif event == "DrainServer.ended" and subject.request.server_id in self._commands:
            self._drained.setdefault(subject.request.server_id, asyncio.Event())
        elif event == "AcquireTickets.ended" and subject.reply.HasField("drained"):
            self._drained.setdefault(subject.request.server_id, asyncio.Event()).set()

    async def _start(self) -> None:
        for name, command in self._commands.items():
            await self.start(name, command)

    async def start(self, name: str, command: Sequence[str]) -> None:
        """Start one process; its log is NAME.log."""
        self.processes[name] = await start(command, log=self._directory / f"{name}.log")

    async def ended(self) -> dict[str, int]:
        """Exit codes; each has to end with the run."""
        return await ended(self.processes)


async def rehearse(
    directory: Path,
    victim: str,
    points: Sequence[KillPoint],
    overrides: Sequence[str] = (),
    listeners: Sequence[Callable[[str, Call | Write], None]] = (),
    backends: Sequence[str] = (),
    network: Network | None = None,
) -> tuple[Outcome, KillPlan, list[str], Evidence]:
    """Run; returns how it ended, the plan, the supervisor's events, and the evidence.

    With addresses of `backends` the servers are workers that feed the run from them. Without a `network` every message
    arrives once and at once.
    """
    overrides = [*SMALL, f"run.directory={directory}", *overrides]
    configuration = load_configuration(EXAMPLE, overrides).with_free_ports()
    addresses = configuration.network
    run_directory = directory / "rehearsal"
    run_directory.mkdir()
    config = run_directory / "config.toml"
    record, plan, events = Record(), KillPlan(victim, deque(points)), list[str]()
    async with recording_proxy(addresses.replay_buffer, record, network) as address:
        late = LateMessages(address, record)
        record.listeners += [plan.on_event, late.on_event, *listeners]
        proxied = addresses.model_copy(update={"replay_buffer": address})
        configuration.model_copy(update={"network": proxied}).write(config)
        arguments = ("--config", str(config), "--supervised")
        plan.supervisor = Supervisor(
            replay_buffer=Service(
                "replay-buffer",
                serve_command("replay-buffer", *arguments, f"--set=network.replay_buffer={addresses.replay_buffer}"),
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
        await late.settle()
    async with open_replay(config) as client:
        groups = [group async for group in client.export_groups()]
        log_directory = run_directory / "replay"
        evidence = Evidence(record, groups, await client.run_status(), run_directory, log_directory)
    return outcome, plan, events, evidence


def _place(index: int, backends: Sequence[str]) -> tuple[str, ...]:
    """A server's own arguments."""
    return ("--index", str(index), *(("--backend", backends[index]) if backends else ()))


def _server_of(subject: Call | Write) -> str:
    return subject.server_id if isinstance(subject, Write) else subject.request.server_id


def _step_of(line: str) -> int:
    return int(json.loads(line)["step"])
