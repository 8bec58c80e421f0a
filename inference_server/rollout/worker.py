"""The rollout worker: tickets in, scored trajectories out.

    replay buffer ── tickets ──> loans ──> one task per member ── generate ──> engine
          ▲                        │             │                   │ chunks, as they come
          │                        │             ▼                   ▼
          │                        │           reward            recorder ──> items
          │                        │             │ close, or failure            │
          └── one ordered stream ──┼─────────────┴──────────── writer <─────────┘
                                   └── leases renewed; aborted loans cancelled

The main loop wakes when a version comes into force, a slot becomes free, tickets arrive, or it is to stop; it asks for
tickets as soon as a group fits beside what is open. Members wait for the engine, for their reward, and for the writer
only while its window is full; never for an acknowledgement. Nothing is asked for before a first version is in force;
as long as none is, the buffer is asked from time to time whether the run still goes on.

The end: the run has finished, or a stop is asked for, or something failed that ends the process. In all cases open
members are cancelled; unless the run has finished they are handed back as retryable failures, so that others take them
at once, and the server leaves the run. A server that is drained goes on asking, until it is readmitted or told to stop.
"""

from __future__ import annotations

import asyncio
import logging

from inference_server.engine import Engine
from inference_server.rollout.open_tickets import Loan, Loans, Member, open_loan
from inference_server.rollout.refusals import Refusals
from inference_server.rollout.reward import RewardRunner
from inference_server.rollout.rollouts import Rollouts
from inference_server.rollout.run_joiner import Joining
from inference_server.rollout.text import Tokenizer
from inference_server.rollout.ticket_calls import TicketCalls
from inference_server.rollout.trajectory_recorder import TrajectoryRecorder
from inference_server.rollout.trajectory_writer import TrajectoryWriter
from inference_server.served_policy import ServedPolicy
from leeway.config import WorkerOptions, WriterOptions
from leeway.errors import LeewayError
from leeway.replay_client import ReplayClient
from leeway.rpc import cancel_and_wait
from leeway.service.metrics import InferenceServerMetrics
from leeway.service.process import unless_stopped
from leeway.tasks import TaskSet
from leeway.types import (
    Ticket,
    TrajectoryFailure,
    WriteItem,
    WriteResult,
    WriteStatus,
)

log = logging.getLogger(__name__)


class RolloutWorker:
    """Feeds one run from one engine; see the module's docstring.

    Args:
        engine: samples.
        policy: which version the engine serves.
        client: the replay buffer.
        server_id: this server's name, unique in the run.
        tasks: must be those the run was opened with.
        tokenizer: encodes prompts, decodes completions.
        reward: scores completions.
        options: bounds of the worker itself.
        writer_options: bounds of the stream to the buffer.
        metrics: shows what happens.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        policy: ServedPolicy,
        client: ReplayClient,
        server_id: str,
        tasks: TaskSet,
        tokenizer: Tokenizer,
        reward: RewardRunner,
        options: WorkerOptions,
        writer_options: WriterOptions,
        metrics: InferenceServerMetrics,
    ) -> None:
        self._engine = engine
        self._info = engine.info()
        self._policy = policy
        self._client = client
        self._server_id = server_id
        self._tasks = tasks
        self._tokenizer = tokenizer
        self._options = options
        self._metrics = metrics
        self._writer = TrajectoryWriter(client, server_id, writer_options, self._on_refused)
        self._rollouts = Rollouts(
            engine, policy, self._writer, tokenizer, reward, options.trajectory_timeout_seconds, metrics
        )
        self._joining = Joining(client, server_id, self._info, policy, tasks.digest)
        self._loans = Loans()
        self._refusals = Refusals(capacity=2 * writer_options.window_items)
        self._members: asyncio.TaskGroup | None = None
        self._turn = asyncio.Event()  # something happened that the main loop looks at
        self._calls = TicketCalls(client, server_id, options.ticket_wait_seconds, metrics, self._turn.set)
        self._fatal = False

    async def run(self, stop: asyncio.Event) -> None:
        """Work until the run has finished or `stop` is set.

        Raises:
            PreconditionError: this server does not fit the run.
            UnavailableError: the engine is gone, or the buffer answers no more.
            ExhaustedError: the reward function hangs too often.
        """
        spec = await unless_stopped(stop, self._joining.begin())
        if spec is None:
            return
        async with asyncio.TaskGroup() as services:
            writer = services.create_task(self._writer.run(), name="trajectory writer")
            renewer = services.create_task(
                self._loans.keep(self._client, self._server_id, self._abort), name="lease renewer"
            )
            try:
                async with asyncio.TaskGroup() as self._members:
                    await self._serve_tickets(stop, self._members, spec.members)
            finally:
                await cancel_and_wait(renewer)
                await self._hand_back()
                writer.cancel()

    # Tickets

    async def _serve_tickets(self, stop: asyncio.Event, members: asyncio.TaskGroup, members_per_group: int) -> None:
        watchers = [asyncio.create_task(self._watch_version()), asyncio.create_task(self._watch_stop(stop))]
        try:
            while not (stop.is_set() or self._calls.finished):
                self._turn.clear()
                self._ask(members_per_group)
                await self._turn.wait()
                for ticket in self._calls.arrived():
                    self._lend(ticket, members)
            if stop.is_set():
                for ticket in await self._calls.last():
                    self._lend(ticket, members)
        finally:
            for watcher in watchers:
                await cancel_and_wait(watcher)
            await self._calls.cancel()
            for loan in self._loans:
                loan.cancel()

    def _ask(self, members_per_group: int) -> None:
        """Ask for what fits beside what is open."""
        # The engine is asked each time: it may take on less when its memory is short.
        capacity = max(self._engine.info().max_concurrency + self._options.prefetch, members_per_group)
        free = capacity - len(self._loans)
        if self._policy.version is not None and free >= members_per_group:
            self._calls.ask(self._policy.version, free)

    async def _watch_version(self) -> None:
        version = self._policy.version
        while True:
            version = await self._policy.wait_for_change(version)
            self._metrics.policy_step.set(version.step)
            self._turn.set()

    async def _watch_stop(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._turn.set()

    def _lend(self, ticket: Ticket, members: asyncio.TaskGroup) -> None:
        """Begin to work on a ticket."""
        loan = open_loan(ticket, self._tasks, self._tokenizer)
        for member in ticket.members:
            recorder = TrajectoryRecorder(ticket, member, loan.prompt, self._info.engine, self._options.routing_rows)
            loan.members[member.trajectory_id] = entry = Member(recorder)
            entry.task = members.create_task(self._roll_out(loan, recorder))
        self._loans.add(loan)
        self._metrics.active.set(len(self._loans))

    # One member

    async def _roll_out(self, loan: Loan, recorder: TrajectoryRecorder) -> None:
        """Sample, score and close one trajectory, or say why not."""
        ending = await self._rollouts.run(loan, recorder)
        await self._end(loan, recorder, ending.item, ending.outcome)
        if ending.fatal is not None and not self._fatal:
            self._fatal = True  # others meet the same error in the same moment; one line says it
            raise ending.fatal

    async def _end(self, loan: Loan, recorder: TrajectoryRecorder, item: WriteItem, outcome: str) -> None:
        await self._writer.write([item])
        self._metrics.trajectories.labels(outcome).inc()
        self._forget(loan, recorder.trajectory_id)

    def _forget(self, loan: Loan, trajectory_id: str) -> None:
        """A member is no longer open; its slot is free."""
        self._loans.end(loan, trajectory_id)
        self._metrics.active.set(len(self._loans))
        self._metrics.unacknowledged_items.set(self._writer.num_unacknowledged)
        self._turn.set()

    # What the buffer takes back

    def _on_refused(self, result: WriteResult) -> None:
        """An item will not be accepted: stop working on what it belongs to, which may have ended here already."""
        loan = self._loans.of(result.trajectory_id)
        if loan is not None and loan.ticket.attempt != result.attempt:
            loan = None
        if result.status is WriteStatus.ABORTED:
            if loan is not None:
                log.info("group %s is aborted: %s", loan.ticket.group_id, result.message)
                self._abort(loan)
            return
        if not self._refusals.add(result):
            return
        message = f"{result.trajectory_id} seq {result.seq} is refused as {result.status.name}: {result.message}"
        log.error("%s", message)
        if loan is not None:
            entry = loan.members[result.trajectory_id]
            if entry.task is not None:
                entry.task.cancel()
            self._metrics.trajectories.labels("aborted").inc()
            self._forget(loan, result.trajectory_id)
        if self._members is not None and result.status in (WriteStatus.INVALID, WriteStatus.OUT_OF_RANGE):
            # The buffer waits for another item in that place: say that none will come.
            missing = result.status is WriteStatus.OUT_OF_RANGE
            seq = result.expected_seq if missing else result.seq
            failure = TrajectoryFailure(message, retryable=missing)
            item = WriteItem(result.trajectory_id, result.attempt, seq, failure)
            self._members.create_task(self._writer.write([item]))

    def _abort(self, loan: Loan) -> None:
        loan.cancel()
        for trajectory_id in list(loan.members):
            self._metrics.trajectories.labels("aborted").inc()
            self._forget(loan, trajectory_id)

    async def _hand_back(self) -> None:
        """Report what is open as failed, to be lent again, wait for the last answers, and leave.

        Says so when it cannot: what it holds is lent again when its leases end.
        """
        failure = TrajectoryFailure(f"server {self._server_id} stopped", retryable=True)
        items = [
            member.recorder.failure(failure)
            for loan in self._loans
            for member in loan.members.values()
            if not self._calls.finished
        ]
        try:
            async with asyncio.timeout(self._options.drain_seconds):
                if items:
                    await self._writer.write(items)
                await self._writer.drain()
                if not self._calls.finished:
                    await self._client.leave_run(self._server_id)
        except (TimeoutError, LeewayError) as error:
            log.warning(
                "the run is left without a word (%s); %d writes were not acknowledged; "
                "what it holds is lent again when the leases end",
                *(str(error) or f"no answer within {self._options.drain_seconds:g} s", self._writer.num_unacknowledged),
            )
