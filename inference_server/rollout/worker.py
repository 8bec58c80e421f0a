"""The rollout worker: tickets in, scored trajectories out.

    replay buffer ── tickets ──> open tickets ──> one task per rollout ── generate ──> engine
          ▲                        │                │                        │ chunks, as they come
          │                        │                ▼                        ▼
          │                        │              reward                  recorder ──> items
          │                        │                │ close, or failure                  │
          └── one ordered stream ──┼────────────────┴───────────────── writer <──────────┘
                                   └── leases are renewed; rollouts of aborted tickets are cancelled

The main loop wakes when a version comes into force, a rollout ends, tickets arrive, or a stop is requested. It requests
tickets as soon as a whole group fits beside the open rollouts. Rollouts wait for the engine, for their reward, and for
the writer only while its window is full; they never wait for an acknowledgement. Until a first version is in force, no
tickets are requested, and the buffer is asked from time to time whether the run has finished.

The worker ends when the run has finished, when a stop is requested, or with the first error that ends the process. In
all cases open rollouts are cancelled. Unless the run has finished, they are handed back as retryable failures, so that
other servers get them at once, and the server leaves the run. A drained server keeps requesting tickets, until it is
readmitted or stopped.
"""

from __future__ import annotations

import asyncio
import logging

from inference_server.engine import Engine
from inference_server.rollout.open_tickets import OpenRollout, OpenTicket, OpenTickets, RefusedAttempts, open_ticket
from inference_server.rollout.reward import RewardRunner
from inference_server.rollout.rollouts import Rollouts
from inference_server.rollout.run_joiner import RunJoiner
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
from leeway.types import Ticket, TrajectoryFailure, WriteItem, WriteResult, WriteStatus

log = logging.getLogger(__name__)


class RolloutWorker:
    """Feeds one run from one engine; see the module's docstring.

    Args:
        engine: samples.
        policy: the version that the engine serves.
        client: the replay buffer.
        server_id: this server's name, unique in the run.
        tasks: must be those that the run was opened with.
        tokenizer: encodes prompts, decodes completions.
        reward: scores completions.
        options: limits of the worker itself.
        writer_options: limits of the stream to the buffer.
        metrics: counts trajectories and shows what is open.
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
        self._joiner = RunJoiner(client, server_id, engine.info(), policy, tasks.digest)
        self._open = OpenTickets()
        self._refused = RefusedAttempts(capacity=2 * writer_options.window_items)
        self._tasks_of_rollouts: asyncio.TaskGroup | None = None
        self._wakeup = asyncio.Event()  # something happened that the main loop acts on
        self._calls = TicketCalls(client, server_id, options.ticket_wait_seconds, metrics, self._wakeup.set)
        self._failed = False

    async def run(self, stop: asyncio.Event) -> None:
        """Feed the run until it has finished or `stop` is set.

        Raises:
            PreconditionError: this server does not fit the run.
            UnavailableError: the engine is gone, or the buffer no longer answers.
            LeewayError: the reward function cannot be called any more.
        """
        spec = await unless_stopped(stop, self._joiner.join())
        if spec is None:
            return
        async with asyncio.TaskGroup() as services:
            writer = services.create_task(self._writer.run(), name="trajectory writer")
            leases = services.create_task(self._open.keep_leases(self._client, self._server_id, self._abort))
            try:
                async with asyncio.TaskGroup() as self._tasks_of_rollouts:
                    await self._serve_tickets(stop, spec.members, self._tasks_of_rollouts)
            finally:
                await cancel_and_wait(leases)
                await self._hand_back()
                writer.cancel()

    async def _serve_tickets(self, stop: asyncio.Event, group_size: int, tasks: asyncio.TaskGroup) -> None:
        watchers = [asyncio.create_task(self._watch_version()), asyncio.create_task(self._watch_stop(stop))]
        try:
            while not (stop.is_set() or self._calls.finished):
                self._wakeup.clear()
                self._request_tickets(group_size)
                await self._wakeup.wait()
                for ticket in self._calls.arrived():
                    self._begin(ticket, tasks)
            if stop.is_set():
                for ticket in await self._calls.last():
                    self._begin(ticket, tasks)  # so that it is handed back
        finally:
            for watcher in watchers:
                await cancel_and_wait(watcher)
            await self._calls.cancel()
            for held in self._open:
                held.cancel()

    def _request_tickets(self, group_size: int) -> None:
        """Request as many rollouts as fit beside the open ones, if that is at least one group."""
        # Read each time: an engine lowers its concurrency when its memory is short.
        capacity = max(self._engine.info().max_concurrency + self._options.prefetch, group_size)
        free = capacity - len(self._open)
        if self._policy.version is not None and free >= group_size:
            self._calls.request(self._policy.version, free)

    async def _watch_version(self) -> None:
        version = self._policy.version
        while True:
            version = await self._policy.wait_for_change(version)
            self._metrics.policy_step.set(version.step)
            self._wakeup.set()

    async def _watch_stop(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._wakeup.set()

    # From ticket to close

    def _begin(self, ticket: Ticket, tasks: asyncio.TaskGroup) -> None:
        """Start a rollout for each member of a ticket."""
        held = open_ticket(ticket, self._tasks, self._tokenizer)
        engine = self._engine.info().engine
        for member in ticket.members:
            recorder = TrajectoryRecorder(ticket, member, held.prompt, engine, self._options.routing_rows)
            held.rollouts[member.trajectory_id] = rollout = OpenRollout(recorder)
            rollout.task = tasks.create_task(self._roll_out(held, recorder))
        self._open.add(held)
        self._metrics.active.set(len(self._open))

    async def _roll_out(self, held: OpenTicket, recorder: TrajectoryRecorder) -> None:
        """Sample, score and close one trajectory, or write why that failed."""
        end = await self._rollouts.run(held, recorder)
        await self._writer.write([end.item])
        self._metrics.trajectories.labels(end.outcome).inc()
        self._end_rollout(held, recorder.trajectory_id)
        if end.fatal is not None and not self._failed:
            self._failed = True  # other rollouts meet the same error now; it is reported once
            raise end.fatal

    def _end_rollout(self, held: OpenTicket, trajectory_id: str) -> None:
        self._open.end_rollout(held, trajectory_id)
        self._metrics.active.set(len(self._open))
        self._metrics.unacknowledged_items.set(self._writer.num_unacknowledged)
        self._wakeup.set()

    # What the buffer takes back

    def _on_refused(self, result: WriteResult) -> None:
        """The buffer will not accept an item: stop its ticket or rollout, which may have ended here already."""
        held = self._open.of(result.trajectory_id)
        if held is not None and held.ticket.attempt != result.attempt:
            held = None
        if result.status is WriteStatus.ABORTED:
            if held is not None:
                log.info("group %s is aborted: %s", held.ticket.group_id, result.message)
                self._abort(held)
            return
        if not self._refused.add(result):
            return
        message = f"{result.trajectory_id} seq {result.seq} is refused as {result.status.name}: {result.message}"
        log.error("%s", message)
        if held is not None:
            task = held.rollouts[result.trajectory_id].task
            if task is not None:
                task.cancel()
            self._metrics.trajectories.labels("aborted").inc()
            self._end_rollout(held, result.trajectory_id)
        if self._tasks_of_rollouts is not None and result.status in (WriteStatus.INVALID, WriteStatus.OUT_OF_RANGE):
            # The buffer still expects an item with this number: a failure says that none will come.
            missing = result.status is WriteStatus.OUT_OF_RANGE
            seq = result.expected_seq if missing else result.seq
            failure = TrajectoryFailure(message, retryable=missing)
            item = WriteItem(result.trajectory_id, result.attempt, seq, failure)
            self._tasks_of_rollouts.create_task(self._writer.write([item]))

    def _abort(self, held: OpenTicket) -> None:
        held.cancel()
        for trajectory_id in list(held.rollouts):
            self._metrics.trajectories.labels("aborted").inc()
            self._end_rollout(held, trajectory_id)

    async def _hand_back(self) -> None:
        """Write open rollouts as retryable failures, wait for the last acknowledgements, and leave the run.

        If the buffer cannot be told, it issues these tickets again when their leases end.
        """
        failure = TrajectoryFailure(f"server {self._server_id} stopped", retryable=True)
        items = [
            rollout.recorder.failure(failure)
            for held in self._open
            for rollout in held.rollouts.values()
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
                "could not notify the buffer before leaving (%s); %d writes were not acknowledged; open tickets are "
                "issued again when their leases end",
                *(str(error) or f"no answer within {self._options.drain_seconds:g} s", self._writer.num_unacknowledged),
            )
