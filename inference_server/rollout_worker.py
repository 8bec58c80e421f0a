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

A waiting call for tickets is never cancelled: its reply may be on the way, and the tickets in it would be lost until
their lease ends. When a newer version comes into force meanwhile, a second call goes out beside it.

The end: the run has finished, or a stop is asked for, or something failed that ends the process. In all cases open
members are cancelled; unless the run has finished they are handed back as retryable failures, so that others take them
at once, and the server leaves the run. A server that is drained goes on asking, until it is readmitted or told to stop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from inference_server.engine import Engine, GenerationEnd, GenerationRequest
from inference_server.recorder import TrajectoryRecorder
from inference_server.requests import Closing
from inference_server.reward import RewardRunner
from inference_server.served_policy import ServedPolicy
from inference_server.text import Tokenizer, prompt_token_ids
from inference_server.trajectory_writer import TrajectoryWriter
from inference_server.write_window import WriterLimits
from leeway.errors import (
    DeadlineError,
    ExhaustedError,
    InvalidDataError,
    LeewayError,
    PreconditionError,
    UnavailableError,
)
from leeway.metrics import InferenceServerMetrics
from leeway.process import unless_stopped
from leeway.replay_client import ReplayClient
from leeway.rpc import cancel_and_wait
from leeway.tasks import Task, TaskSet
from leeway.types import (
    Drain,
    FinishReason,
    Int32Array,
    LogprobMode,
    PolicyVersion,
    Purpose,
    RunSpec,
    Ticket,
    TrajectoryFailure,
    WriteItem,
    WriteResult,
    WriteStatus,
)

_JOIN_WAIT_SECONDS: Final = 30.0
_RETRY_SECONDS: Final = 1.0
_MAX_ACQUIRE_CALLS: Final = 2

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """Bounds of the worker.

    Args:
        prefetch: members taken beyond what the engine decodes at once, so that it never idles.
        ticket_wait_seconds: longest wait of one call for tickets.
        trajectory_timeout_seconds: longest generation, queueing included.
        drain_seconds: longest wait for the last acknowledgements before the end.
        routing_rows: tokens whose routing is held back to be packed together; 0 writes plain ids as they come.
    """

    prefetch: int = 16
    ticket_wait_seconds: float = 2.0
    trajectory_timeout_seconds: float = 1800.0
    drain_seconds: float = 4.0
    routing_rows: int = 8192


@dataclass(slots=True, eq=False)
class _Member:
    """A trajectory that is open: its record so far, and the task that works on it."""

    recorder: TrajectoryRecorder
    task: asyncio.Task[None] | None = None


@dataclass(slots=True, eq=False)
class _Loan:
    """A ticket with members that are still open, by trajectory id."""

    ticket: Ticket
    task: Task
    where: str  # names the task in messages
    prompt: Int32Array
    members: dict[str, _Member] = field(default_factory=dict[str, _Member])


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
        limits: bounds of the worker itself.
        writer_limits: bounds of the stream to the buffer.
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
        limits: WorkerLimits,
        writer_limits: WriterLimits,
        metrics: InferenceServerMetrics,
    ) -> None:
        self._engine = engine
        self._info = engine.info()
        self._policy = policy
        self._client = client
        self._server_id = server_id
        self._tasks = tasks
        self._tokenizer = tokenizer
        self._reward = reward
        self._limits = limits
        self._metrics = metrics
        self._writer = TrajectoryWriter(client, server_id, writer_limits, self._on_refused)
        self._loans: dict[tuple[str, int], _Loan] = {}
        self._loan_of: dict[str, _Loan] = {}  # by trajectory id, while the member is open
        self._refused: set[tuple[str, int]] = set()  # (trajectory id, attempt)
        self._members: asyncio.TaskGroup | None = None
        self._lent = asyncio.Event()
        self._turn = asyncio.Event()  # something happened that the main loop looks at
        self._finished = False
        self._fatal = False
        self._drain: Drain | None = None  # set while this server gets no work

    async def run(self, stop: asyncio.Event) -> None:
        """Work until the run has finished or `stop` is set.

        Raises:
            PreconditionError: this server does not fit the run.
            UnavailableError: the engine is gone, or the buffer answers no more.
            ExhaustedError: the reward function hangs too often.
        """
        spec = await unless_stopped(stop, self._begin())
        if spec is None:
            return
        async with asyncio.TaskGroup() as services:
            writer = services.create_task(self._writer.run(), name="trajectory writer")
            renewer = services.create_task(self._renew_leases(), name="lease renewer")
            try:
                async with asyncio.TaskGroup() as self._members:
                    await self._serve_tickets(stop, self._members, spec.members)
            finally:
                await cancel_and_wait(renewer)
                await self._hand_back()
                writer.cancel()

    # Joining

    async def _begin(self) -> RunSpec | None:
        """Join, and wait for a first version; None when the run has finished: its learner may be gone for good."""
        spec, finished = await self._join()
        while not finished:
            try:
                async with asyncio.timeout(_JOIN_WAIT_SECONDS):
                    await self._policy.wait_for_change(None)
                return spec
            except TimeoutError:
                log.info("no version of run %s has come yet; asking whether it still goes on", spec.run)
                spec, finished = await self._ask_to_join()
        log.info("run %s has finished; there is nothing left to do", spec.run)
        return None

    async def _join(self) -> tuple[RunSpec, bool]:
        info = self._info
        if info.logprob_mode is not LogprobMode.SAMPLED:
            raise PreconditionError(
                f"{info.engine} reports log-probs of the raw distribution; a run needs those of the distribution "
                "sampled from (temperature included): set the engine's log-prob mode"
            )
        log.info("waiting for run %s to open at %s", self._client.run, self._client.address)
        spec, finished = await self._ask_to_join()
        if spec.sampling.routing and not info.routing:
            raise PreconditionError(f"run {spec.run} records routing, which {info.engine} does not provide")
        if spec.sampling.topk > info.max_topk:
            raise PreconditionError(
                f"run {spec.run} records top-{spec.sampling.topk}; {info.engine} provides at most {info.max_topk}"
            )
        log.info("joined run %s", spec.run)
        return spec, finished

    async def _ask_to_join(self) -> tuple[RunSpec, bool]:
        while True:
            try:
                return await self._client.join_run(
                    self._server_id, self._info.signature, self._tasks.digest, _JOIN_WAIT_SECONDS
                )
            except (DeadlineError, UnavailableError, ExhaustedError) as error:
                log.info("run %s is not open yet (%s)", self._client.run, error.message)
                await asyncio.sleep(_RETRY_SECONDS)

    # Tickets

    async def _serve_tickets(self, stop: asyncio.Event, members: asyncio.TaskGroup, members_per_group: int) -> None:
        calls: dict[asyncio.Task[list[Ticket]], PolicyVersion] = {}
        watchers = [asyncio.create_task(self._watch_version()), asyncio.create_task(self._watch_stop(stop))]
        try:
            while not (stop.is_set() or self._finished):
                self._turn.clear()
                # Asked each time: an engine may take on less when its memory is short.
                capacity = max(self._engine.info().max_concurrency + self._limits.prefetch, members_per_group)
                free = capacity - len(self._loan_of)
                version = self._policy.version
                if (
                    version is not None
                    and free >= members_per_group
                    and len(calls) < _MAX_ACQUIRE_CALLS
                    and version not in calls.values()
                ):
                    call = asyncio.create_task(self._acquire(version, free), name="acquire tickets")
                    call.add_done_callback(lambda _: self._turn.set())
                    calls[call] = version
                await self._turn.wait()
                for call in [call for call in calls if call.done()]:
                    del calls[call]
                    for ticket in call.result():
                        self._lend(ticket, members)
            if stop.is_set() and calls:
                # Their tickets would be lost until the leases end; each call ends by itself in a moment.
                done, _ = await asyncio.wait(calls, timeout=self._limits.ticket_wait_seconds + 1.0)
                for call in done:
                    for ticket in call.result():
                        self._lend(ticket, members)
        finally:
            for task in (*watchers, *calls):
                await cancel_and_wait(task)
            for loan in self._loans.values():
                _cancel(loan)

    async def _acquire(self, version: PolicyVersion, max_members: int) -> list[Ticket]:
        started_at = time.perf_counter()
        try:
            work = await self._client.request_work(
                self._server_id, version, max_members, self._limits.ticket_wait_seconds
            )
        except (ExhaustedError, UnavailableError, DeadlineError) as error:
            log.warning("no tickets: %s; asking again", error.message)
            told_seconds = error.retry_seconds if isinstance(error, ExhaustedError) else None
            await asyncio.sleep(told_seconds or _RETRY_SECONDS)
            return []
        if work.finished:
            log.info("run %s has finished", self._client.run)
            self._finished = True
        if work.tickets:
            self._metrics.ticket_wait_seconds.observe(time.perf_counter() - started_at)
        self._hear_of_drain(work.drained)
        return work.tickets

    def _hear_of_drain(self, drain: Drain | None) -> None:
        """Say once that this server is out of the run, and once that it is in it again."""
        if drain == self._drain:
            return
        self._drain = drain
        if drain is None:
            log.warning("server %s is readmitted to run %s", self._server_id, self._client.run)
        else:
            log.warning(
                "server %s is drained (%s) and gets no work until `leeway fleet readmit`: %s",
                *(self._server_id, drain.reason.name.lower(), drain.message),
            )

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
        loan = self._open_loan(ticket)
        for member in ticket.members:
            recorder = TrajectoryRecorder(ticket, member, loan.prompt, self._info.engine, self._limits.routing_rows)
            loan.members[member.trajectory_id] = entry = _Member(recorder)
            self._loan_of[member.trajectory_id] = loan
            entry.task = members.create_task(self._roll_out(loan, recorder))
        self._loans[ticket.group_id, ticket.attempt] = loan
        self._lent.set()
        self._metrics.active.set(len(self._loan_of))

    def _open_loan(self, ticket: Ticket) -> _Loan:
        train = ticket.purpose is Purpose.TRAIN
        tasks: Sequence[Task] = self._tasks.train if train else self._tasks.heldout
        where = f"{'training' if train else 'held-out'} task {ticket.task_index}"
        if ticket.task_index >= len(tasks):
            return _Loan(ticket, {}, where, np.zeros(0, dtype=np.int32))
        task = tasks[ticket.task_index]
        return _Loan(ticket, task, where, prompt_token_ids(self._tokenizer, task))

    # One member

    async def _roll_out(self, loan: _Loan, recorder: TrajectoryRecorder) -> None:
        """Sample, score and close one trajectory, or say why not."""
        fatal: LeewayError | None = None
        try:
            async with asyncio.timeout(self._limits.trajectory_timeout_seconds):
                outcome: GenerationEnd | TrajectoryFailure = await self._generate(loan, recorder)
        except TimeoutError:
            seconds = self._limits.trajectory_timeout_seconds
            outcome = TrajectoryFailure(f"generation took longer than {seconds:g} s on {loan.where}", retryable=True)
        except InvalidDataError as error:
            outcome = TrajectoryFailure(f"{loan.where}: {error.message}", retryable=False)
        except DeadlineError as error:
            outcome = TrajectoryFailure(f"{loan.where}: {error.message}", retryable=True)
        except (UnavailableError, PreconditionError) as error:
            # Stopped, or restarted without its weights: whatever this process samples next would fail too.
            fatal = UnavailableError(f"the engine is gone: {error.message}")
            outcome = TrajectoryFailure(error.message, retryable=True)
        if isinstance(outcome, GenerationEnd):
            text = self._tokenizer.decode(recorder.sampled_token_ids)
            try:
                reward = await self._reward.score(loan.task, text, loan.where)
            except ExhaustedError as error:
                fatal = error
                reward = TrajectoryFailure(error.message, retryable=True)
            if not isinstance(reward, TrajectoryFailure):
                await self._end(loan, recorder, recorder.close(outcome, reward), "closed")
                return
            outcome = reward
        log.warning("%s fails: %s", recorder.trajectory_id, outcome.message)
        await self._end(loan, recorder, recorder.failure(outcome), "failed")
        if fatal is not None and not self._fatal:
            self._fatal = True  # others meet the same error in the same moment; one line says it
            raise fatal

    async def _generate(self, loan: _Loan, recorder: TrajectoryRecorder) -> GenerationEnd | TrajectoryFailure:
        """Stream one completion to the writer."""
        unusable = self._unusable(loan)
        if unusable is not None:
            return unusable
        pinned = loan.ticket.pinned_version
        request = GenerationRequest(recorder.trajectory_id, loan.prompt, recorder.sampling)
        while True:
            try:
                async with Closing(self._engine.generate(request)) as events:
                    async for event in events:
                        if isinstance(event, GenerationEnd):
                            if (rest := recorder.rest()) is not None:
                                await self._writer.write([rest])
                                recorder.written()
                            return self._checked(event, recorder)
                        if pinned is not None and any(span.version != pinned for span in event.version_spans):
                            message = f"evaluation of {pinned}: another version came into force"
                            return TrajectoryFailure(message, retryable=True)
                        await self._writer.write([recorder.chunk(event)])
                        recorder.written()
                raise UnavailableError("the engine ended a generation without saying why")
            except ExhaustedError:
                # A backend may queue less than it decodes at once; it has room again in a moment.
                await asyncio.sleep(_RETRY_SECONDS)

    def _unusable(self, loan: _Loan) -> TrajectoryFailure | None:
        """Why a loan cannot be worked on at all."""
        context_length = self._info.signature.context_length
        pinned = loan.ticket.pinned_version
        if not loan.task:
            return TrajectoryFailure(f"{loan.where} does not exist on this server", retryable=False)
        if not len(loan.prompt):
            return TrajectoryFailure(f"{loan.where}: its prompt has no tokens", retryable=False)
        if len(loan.prompt) + 1 > context_length:
            message = f"{loan.where}: its prompt has {len(loan.prompt)} tokens; the model's context is {context_length}"
            return TrajectoryFailure(message, retryable=False)
        if pinned is not None and pinned != self._policy.version:
            return TrajectoryFailure(f"evaluation of {pinned}: this server has moved on", retryable=True)
        return None

    def _checked(self, end: GenerationEnd, recorder: TrajectoryRecorder) -> GenerationEnd | TrajectoryFailure:
        if end.finish_reason is FinishReason.ABORTED:
            return TrajectoryFailure("the engine gave up the request", retryable=True)
        if end.num_tokens != recorder.num_sampled or not recorder.num_sampled:
            message = f"the engine announced {end.num_tokens} tokens, but sent {recorder.num_sampled}"
            return TrajectoryFailure(message, retryable=False)
        self._metrics.tokens.inc(end.num_tokens)
        return end

    async def _end(self, loan: _Loan, recorder: TrajectoryRecorder, item: WriteItem, outcome: str) -> None:
        await self._writer.write([item])
        self._metrics.trajectories.labels(outcome).inc()
        self._forget(loan, recorder.trajectory_id)

    def _forget(self, loan: _Loan, trajectory_id: str) -> None:
        """A member is no longer open; its slot is free."""
        loan.members.pop(trajectory_id, None)
        if self._loan_of.get(trajectory_id) is loan:
            del self._loan_of[trajectory_id]
        if not loan.members:
            self._loans.pop((loan.ticket.group_id, loan.ticket.attempt), None)
        self._metrics.active.set(len(self._loan_of))
        self._metrics.unacknowledged_items.set(self._writer.num_unacknowledged)
        self._turn.set()

    # What the buffer takes back

    def _on_refused(self, result: WriteResult) -> None:
        """An item will not be accepted: stop working on what it belongs to, which may have ended here already."""
        loan = self._loan_of.get(result.trajectory_id)
        if loan is not None and loan.ticket.attempt != result.attempt:
            loan = None
        if result.status is WriteStatus.ABORTED:
            if loan is not None:
                log.info("group %s is aborted: %s", loan.ticket.group_id, result.message)
                self._abort(loan)
            return
        if (result.trajectory_id, result.attempt) in self._refused:
            return
        self._refused.add((result.trajectory_id, result.attempt))
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

    def _abort(self, loan: _Loan) -> None:
        _cancel(loan)
        for trajectory_id in list(loan.members):
            self._metrics.trajectories.labels("aborted").inc()
            self._forget(loan, trajectory_id)

    async def _renew_leases(self) -> None:
        """Keep what is open, also while the engine queues or a reward takes long; accepted writes renew leases too."""
        while True:
            if not self._loans:
                self._lent.clear()
                await self._lent.wait()
                continue
            await asyncio.sleep(min(loan.ticket.lease_seconds for loan in self._loans.values()) / 3)
            if not self._loans:
                continue
            try:
                aborted = await self._client.renew_leases(self._server_id, list(self._loans))
            except (UnavailableError, DeadlineError, ExhaustedError) as error:
                log.warning("leases are not renewed: %s", error.message)
                continue
            for key in aborted:
                if (loan := self._loans.get(key)) is not None:
                    log.info("group %s is no longer lent to this server", loan.ticket.group_id)
                    self._abort(loan)

    async def _hand_back(self) -> None:
        """Report what is open as failed, to be lent again, wait for the last answers, and leave.

        Says so when it cannot: what it holds is lent again when its leases end.
        """
        failure = TrajectoryFailure(f"server {self._server_id} stopped", retryable=True)
        items = [
            member.recorder.failure(failure)
            for loan in self._loans.values()
            for member in loan.members.values()
            if not self._finished
        ]
        try:
            async with asyncio.timeout(self._limits.drain_seconds):
                if items:
                    await self._writer.write(items)
                await self._writer.drain()
                if not self._finished:
                    await self._client.leave_run(self._server_id)
        except (TimeoutError, LeewayError) as error:
            log.warning(
                "the run is left without a word (%s); %d writes were not acknowledged",
                *(error, self._writer.num_unacknowledged),
            )


def _cancel(loan: _Loan) -> None:
    for member in loan.members.values():
        if member.task is not None:
            member.task.cancel()
