"""An engine that samples by the arithmetic law: the whole protocol at full speed, without a model.

    generate ──> waiting ──> active (at most max_concurrency) ──> step: one token each ──> chunks ──> the iterators
                                              ▲
    update_weights ── between two steps: the next token of every sequence comes from the new version

One task steps all sequences and is the only one that samples; a step never awaits, so an update cannot fall into one.
The iterators wait for their chunks; the task waits for work and while paused.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np

from inference_server.engine import GenerationEnd, GenerationRequest, check_request
from leeway import arithmetic
from leeway.arithmetic import ArithmeticWeights
from leeway.config import ArithmeticEngineOptions
from leeway.errors import ExhaustedError, FencedError, LeewayError, PreconditionError, UnavailableError
from leeway.types import (
    Column,
    ColumnKind,
    EngineInfo,
    FinishReason,
    LogprobMode,
    PolicyVersion,
    TrajectoryChunk,
    VersionSpan,
    WeightSnapshot,
)


@dataclass(slots=True, eq=False)
class _Sequence:
    """One request while it is sampled; [first_unsent, length) is not yet in a chunk."""

    request: GenerationRequest
    prompt_length: int
    length: int
    last_token: int
    started_at: datetime
    events: asyncio.Queue[TrajectoryChunk | GenerationEnd | LeewayError]
    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    topk_token_ids: list[list[int]] = field(default_factory=list[list[int]])
    topk_logprobs: list[list[float]] = field(default_factory=list[list[float]])
    routing: list[list[list[int]]] = field(default_factory=list[list[list[int]]])
    first_routing: int = 0
    spans: list[VersionSpan] = field(default_factory=list[VersionSpan])
    span_start: int = 0
    span_version: PolicyVersion | None = None
    ended: bool = False


async def start(_model_path: None, options: ArithmeticEngineOptions) -> ArithmeticEngine:
    """The engine; there is nothing to load."""
    return ArithmeticEngine(options)


class ArithmeticEngine:
    """Implements Engine; see the module's docstring."""

    def __init__(self, options: ArithmeticEngineOptions) -> None:
        self._options = options
        self._policy: tuple[PolicyVersion, ArithmeticWeights] | None = None
        self._highest_epoch = 0
        self._waiting: deque[_Sequence] = deque()
        self._active: list[_Sequence] = []
        self._stepping: asyncio.Task[None] | None = None
        self._work = asyncio.Event()
        self._running = asyncio.Event()
        self._running.set()
        self._closed = False

    def info(self) -> EngineInfo:
        return EngineInfo(
            signature=arithmetic.SIGNATURE,
            engine="arithmetic/1",
            logprob_mode=LogprobMode.SAMPLED,
            version=self._policy[0] if self._policy else None,
            max_topk=self._options.max_topk,
            routing=True,
            max_concurrency=self._options.max_concurrency,
        )

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TrajectoryChunk | GenerationEnd, None]:
        check_request(request, self.info())
        if self._closed:
            raise UnavailableError("the engine is stopping")
        if self._policy is None:
            raise PreconditionError("no weights are loaded yet; update the weights first")
        if len(self._waiting) >= self._options.max_queued and len(self._active) >= self._options.max_concurrency:
            raise ExhaustedError(f"{len(self._waiting)} requests wait already; repeat later")
        prompt = request.prompt_token_ids
        sequence = _Sequence(
            request,
            len(prompt),
            len(prompt),
            int(prompt[-1]),
            datetime.now(UTC),
            asyncio.Queue(),
            span_start=len(prompt),
        )
        self._waiting.append(sequence)
        if self._stepping is None:
            self._stepping = asyncio.create_task(self._step_forever(), name="arithmetic engine")
            self._stepping.add_done_callback(self._on_stopped)
        self._work.set()
        try:
            while True:
                event = await sequence.events.get()
                if isinstance(event, LeewayError):
                    raise event
                yield event
                if isinstance(event, GenerationEnd):
                    return
        finally:
            self._forget(sequence)

    async def update_weights(self, snapshot: WeightSnapshot) -> float:
        if snapshot.publisher_epoch < self._highest_epoch:
            raise FencedError(
                f"weights of learner epoch {snapshot.publisher_epoch} are refused; epoch {self._highest_epoch} was seen"
            )
        self._highest_epoch = snapshot.publisher_epoch
        if self._policy is None or self._policy[0] != snapshot.version:
            self._policy = snapshot.version, arithmetic.read_weights(snapshot.manifest, snapshot.buffers)
        return 0.0

    async def pause(self) -> None:
        self._running.clear()

    async def resume(self) -> None:
        self._running.set()

    async def aclose(self) -> None:
        self._closed = True
        if self._stepping is not None:
            self._stepping.cancel()
            await asyncio.wait([self._stepping])

    def _on_stopped(self, task: asyncio.Task[None]) -> None:
        self._closed = True
        reason = "is stopping" if task.cancelled() else f"failed: {task.exception()!r}"
        for sequence in [*self._active, *self._waiting]:
            sequence.events.put_nowait(UnavailableError(f"the engine {reason}"))

    def _forget(self, sequence: _Sequence) -> None:
        if sequence.ended:
            return
        for holder in (self._active, self._waiting):
            if sequence in holder:
                holder.remove(sequence)

    async def _step_forever(self) -> None:
        loop = asyncio.get_running_loop()
        step_at = loop.time()
        while True:
            if not self._active and not self._waiting:
                self._work.clear()
                await self._work.wait()
            while not self._running.is_set():  # a pause may have followed on the resume
                await self._running.wait()
            if self._policy is not None:
                self._step(*self._policy)
            # The simulated decode time; at least one turn of the loop, in which updates and requests come in.
            step_at = max(step_at + self._options.token_seconds, loop.time())
            await asyncio.sleep(step_at - loop.time())

    def _step(self, version: PolicyVersion, weights: ArithmeticWeights) -> None:
        """One token for every active sequence, all from the same weights."""
        while self._waiting and len(self._active) < self._options.max_concurrency:
            self._active.append(self._waiting.popleft())
        going: list[_Sequence] = []
        for sequence in self._active:
            self._append_token(sequence, weights, version)
            reason = self._finish_reason(sequence)
            if reason is not None:
                sequence.ended = True
                self._emit(sequence, last=True)
                sequence.events.put_nowait(
                    GenerationEnd(
                        reason, sequence.length - sequence.prompt_length, sequence.started_at, datetime.now(UTC)
                    )
                )
                continue
            if len(sequence.token_ids) >= self._options.chunk_tokens:
                self._emit(sequence, last=False)
            going.append(sequence)
        self._active = going

    def _append_token(self, sequence: _Sequence, weights: ArithmeticWeights, version: PolicyVersion) -> None:
        sampling = sequence.request.sampling
        distribution = arithmetic.next_distribution(weights, sequence.length, sequence.last_token, sampling.temperature)
        token_id, logprob = arithmetic.sample(distribution, sequence.length, sampling.seed)
        sequence.token_ids.append(token_id)
        sequence.logprobs.append(logprob)
        if sampling.topk:
            top = distribution.top(sampling.topk)
            sequence.topk_token_ids.append(top)
            sequence.topk_logprobs.append([distribution.logprob(candidate) for candidate in top])
        if sampling.routing:
            self._append_routing(sequence, weights)
        if version is not sequence.span_version:
            self._end_span(sequence)
            sequence.span_version = version
        sequence.last_token = token_id
        sequence.length += 1

    @staticmethod
    def _append_routing(sequence: _Sequence, weights: ArithmeticWeights) -> None:
        """Rows of the tokens fed in this step: the whole prompt before the first token, then one each."""
        if sequence.length == sequence.prompt_length:
            for position, token_id in enumerate(sequence.request.prompt_token_ids.tolist()):
                sequence.routing.append(arithmetic.routing_row(weights, position, token_id))
        else:
            sequence.routing.append(arithmetic.routing_row(weights, sequence.length - 1, sequence.last_token))

    @staticmethod
    def _end_span(sequence: _Sequence) -> None:
        if sequence.span_version is not None and sequence.length > sequence.span_start:
            sequence.spans.append(VersionSpan(sequence.span_start, sequence.length, sequence.span_version))
        sequence.span_start = sequence.length

    @staticmethod
    def _finish_reason(sequence: _Sequence) -> FinishReason | None:
        sampling = sequence.request.sampling
        if sequence.last_token in sampling.stop_token_ids:
            return FinishReason.STOP
        if sequence.length - sequence.prompt_length >= sampling.max_tokens:
            return FinishReason.LENGTH
        if sequence.length >= arithmetic.SIGNATURE.context_length:
            return FinishReason.CONTEXT
        return None

    def _emit(self, sequence: _Sequence, *, last: bool) -> None:
        """Send what is known and unsent; late columns wait for the end."""
        start, end = sequence.length - len(sequence.token_ids), sequence.length
        columns = [
            Column(ColumnKind.TOKEN_IDS, start, end, np.array(sequence.token_ids, dtype=np.int32)),
            Column(ColumnKind.BEHAVIOR_LOGPROBS, start, end, np.array(sequence.logprobs, dtype=np.float32)),
        ]
        if sequence.topk_token_ids:
            ids = np.array(sequence.topk_token_ids, dtype=np.int32)
            logprobs = np.array(sequence.topk_logprobs, dtype=np.float32)
            columns.append(Column(ColumnKind.TOPK_TOKEN_IDS, start, end, ids))
            columns.append(Column(ColumnKind.TOPK_LOGPROBS, start, end, logprobs))
            sequence.topk_token_ids, sequence.topk_logprobs = [], []
        sequence.token_ids, sequence.logprobs = [], []
        spans: tuple[VersionSpan, ...] = ()
        if last or not self._options.late_columns:
            self._end_span(sequence)
            spans, sequence.spans = tuple(sequence.spans), []
            if sequence.routing:
                rows = np.array(sequence.routing, dtype=np.uint8)
                first, sequence.first_routing = sequence.first_routing, sequence.first_routing + len(rows)
                columns.append(Column(ColumnKind.ROUTING, first, sequence.first_routing, rows))
                sequence.routing = []
        sequence.events.put_nowait(TrajectoryChunk(tuple(columns), version_spans=spans))
