"""An engine over a driver: admission, pause, weight swap and death of an engine with processes of its own.

    generate ── slot ──> admitted ──> driver.sample ──> chunks; version spans, from labels, with the last one
                            ▲ not while weights are swapped
    update_weights ── staged file ──> pause ── load ── resume     one command at a time,
    pause, resume ──────────────────> pause / resume              each to its end, whatever becomes of its caller
                                          │ fails, or does not answer in time
    watch <── failure <───────────────────┴──> driver.kill ──> open streams end

Every pause is followed by a resume: a swap resumes at its end unless `pause` was called, and a pause whose caller gave
up before it was reached is undone. A command that fails, does not answer or is interrupted kills the engine, because it
is then unknown whether decoding stands still and whether its weights are a mixture. A dead engine samples nothing: its
processes are killed, open iterators and later calls raise UnavailableError, and so does `watch`, which ends the server.
A new server joins the run like any late one.

Each step of the engine is labelled with a number that stands for a version; spans are made from those labels.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from prometheus_client.registry import Collector

from inference_server.engine import GenerationEnd, GenerationRequest, check_request
from inference_server.engines.process.concurrency import ConcurrencyLimit
from inference_server.engines.process.driver import EngineDriver, SampledEnd, one_line
from inference_server.engines.process.staged_weights import staged_weights
from leeway.config import ProcessEngineOptions
from leeway.errors import DeadlineError, FencedError, UnavailableError
from leeway.types import (
    EngineInfo,
    FinishReason,
    PolicyVersion,
    TrajectoryChunk,
    VersionSpan,
    WeightManifest,
    WeightSnapshot,
)

_T = TypeVar("_T")


class ProcessEngine:
    """An Engine over a driver; used from one event loop.

    Args:
        driver: the engine's own interface, started.
        info: what it serves; version and concurrency are filled in.
        options: how it is given requests and weights.
        limit: slots, which the driver steers.
        check: raises PreconditionError for weights that are not the model's.
    """

    def __init__(
        self,
        driver: EngineDriver,
        info: EngineInfo,
        options: ProcessEngineOptions,
        limit: ConcurrencyLimit,
        check: Callable[[WeightManifest], None],
    ) -> None:
        self._driver = driver
        self._info = info
        self._limit = limit
        self._check = check
        self._context_length = options.context_length or info.signature.context_length
        self._recompute = options.kv_on_update == "recompute"
        self._staging_directory = options.staging_directory
        self._command_timeout_seconds = options.command_timeout_seconds
        self._versions: dict[int, PolicyVersion] = {}  # by label; those that open requests may still name
        self._label = 0
        self._highest_epoch = 0
        self._numbers = itertools.count()
        self._open: dict[str, int] = {}  # requests in the engine, with the label they started under
        self._commanding = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._admitting = asyncio.Event()  # not while weights are swapped
        self._admitting.set()
        self._paused = False  # by `pause`
        self._failure: str | None = None
        self._failed = asyncio.Event()

    def info(self) -> EngineInfo:
        return replace(self._info, version=self._versions.get(self._label), max_concurrency=self._limit.limit)

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TrajectoryChunk | GenerationEnd, None]:
        """Sample one completion. An invalid request is refused here, before the engine sees it.

        Raises:
            InvalidDataError: ids outside the vocabulary, which would kill an engine; an empty or over-long prompt.
            UnavailableError: from the iterator: the engine stops or has failed, or has no version yet.
            ExhaustedError: from the iterator: too many requests wait.
        """
        check_request(request, self.info(), self._context_length)
        return self._stream(request)

    async def update_weights(self, snapshot: WeightSnapshot) -> float:
        """Stage a file beside the running model, pause, swap, resume; returns the seconds that decoding paused.

        Raises:
            FencedError: a higher publisher epoch has been seen.
            PreconditionError: names or shapes are not the model's, or there is no room to stage; the old weights stay.
            UnavailableError, DeadlineError: the engine failed while it swapped; nothing is sampled any more.
        """
        return await asyncio.shield(self._to_its_end(self._update(snapshot)))

    async def pause(self) -> None:
        """Pause decoding. If this is cancelled before decoding stands still, decoding continues."""
        abandoned = asyncio.Event()
        try:
            await asyncio.shield(self._to_its_end(self._pause(abandoned)))
        except asyncio.CancelledError:
            abandoned.set()
            raise

    async def resume(self) -> None:
        await asyncio.shield(self._to_its_end(self._resume()))

    async def watch(self) -> None:
        """Wait until the engine has died or failed.

        Raises:
            UnavailableError: it has.
        """
        # No deadline: the engine normally lives as long as this process.
        ended = asyncio.create_task(self._driver.ended())
        failed = asyncio.create_task(self._failed.wait())
        try:
            await asyncio.wait([ended, failed], return_when=asyncio.FIRST_COMPLETED)
            why = ended.result() if ended.done() else ""
        finally:
            ended.cancel()
            failed.cancel()
        raise self._fail(f"{self._driver.name} has died{why and ': '}{why}; its log says why")

    def collectors(self) -> Sequence[Collector]:
        """The engine's own metrics."""
        return self._driver.collectors()

    async def aclose(self) -> None:
        self._failure = self._failure or "the engine stops; send the request to another server"
        self._failed.set()
        await self._driver.aclose(list(self._open))
        if self._tasks:
            await asyncio.wait(self._tasks)

    # One completion

    async def _stream(self, request: GenerationRequest) -> AsyncGenerator[TrajectoryChunk | GenerationEnd, None]:
        self._require_weights()
        async with self._limit.slot():
            await self._admitting.wait()  # no deadline of its own: each command of a swap has one
            self._require_weights()
            request_id = f"{request.request_id}-{next(self._numbers)}"
            self._open[request_id] = self._label
            try:
                async for item in self._sample(request, request_id):
                    yield item
            except self._driver.failures as error:
                raise self._fail(f"{self._driver.name} failed while it sampled: {one_line(error)}") from error
            finally:
                del self._open[request_id]

    async def _sample(
        self, request: GenerationRequest, request_id: str
    ) -> AsyncGenerator[TrajectoryChunk | GenerationEnd, None]:
        started_at = datetime.now(UTC)
        num_prompt = len(request.prompt_token_ids)
        max_tokens = min(request.sampling.max_tokens, self._context_length - num_prompt)
        sampled = self._driver.sample(request, request_id, self._label, max_tokens)
        async with contextlib.aclosing(sampled):
            async for item in sampled:
                if isinstance(item, TrajectoryChunk):
                    yield item
                    continue
                self._require_life()
                if item.finish_reason is not FinishReason.ABORTED:
                    yield TrajectoryChunk(columns=item.columns, version_spans=self._spans(item, num_prompt))
                yield GenerationEnd(item.finish_reason, item.num_tokens, started_at, datetime.now(UTC))

    def _spans(self, end: SampledEnd, num_prompt: int) -> tuple[VersionSpan, ...]:
        spans = tuple(
            VersionSpan(num_prompt + labelled.start, num_prompt + labelled.end, self._versions[labelled.label])
            for labelled in end.labels
            if labelled.start < labelled.end
        )
        if not spans or spans[-1].end_token != num_prompt + end.num_tokens:
            raise UnavailableError(
                f"{self._driver.name} labelled no version of token {num_prompt + end.num_tokens - 1}"
            )
        return spans

    # Commands

    def _to_its_end(self, command: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        """Start a command that continues if its caller is cancelled."""
        task = asyncio.create_task(command)
        self._tasks.add(task)
        task.add_done_callback(self._has_ended)
        return task

    def _has_ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # retrieved here, because its caller may be gone

    async def _pause(self, abandoned: asyncio.Event) -> None:
        async with self._commanding:
            self._require_life()
            if self._paused or abandoned.is_set():
                return
            await self._command("the pause", self._driver.pause(recompute=False))
            if abandoned.is_set():
                await self._command("going on", self._driver.resume())
            else:
                self._paused = True

    async def _resume(self) -> None:
        async with self._commanding:
            self._require_life()
            await self._command("going on", self._driver.resume())
            self._paused = False

    async def _update(self, snapshot: WeightSnapshot) -> float:
        async with self._commanding:
            self._require_life()
            if snapshot.publisher_epoch < self._highest_epoch:
                raise FencedError(
                    f"weights of publisher epoch {snapshot.publisher_epoch} are refused: "
                    f"epoch {self._highest_epoch} took over"
                )
            self._highest_epoch = snapshot.publisher_epoch
            if snapshot.version == self._versions.get(self._label):
                return 0.0
            self._check(snapshot.manifest)
            staging = staged_weights(snapshot, self._staging_directory)
            folder = await asyncio.to_thread(staging.__enter__)
            self._admitting.clear()
            try:
                return await self._swap(snapshot.version, folder)
            finally:
                self._admitting.set()
                await asyncio.to_thread(staging.__exit__, None, None, None)

    async def _swap(self, version: PolicyVersion, folder: Path) -> float:
        stopped_at = time.perf_counter()
        label = self._label + 1
        await self._command("the pause", self._driver.pause(recompute=self._recompute))
        await self._command("the swap", self._driver.load(folder, label))
        still_named = min(self._open.values(), default=self._label)
        self._versions = {old: named for old, named in self._versions.items() if old >= still_named}
        self._versions[label] = version
        self._label = label
        if not self._paused:
            await self._command("going on", self._driver.resume())
        return time.perf_counter() - stopped_at

    async def _command(self, what: str, command: Coroutine[Any, Any, None]) -> None:
        """Await one of the engine's commands. Its failure is the failure of the engine, and the reverse."""
        name = self._driver.name
        commanded, failed = asyncio.create_task(command), asyncio.create_task(self._failed.wait())
        try:
            await asyncio.wait(
                [commanded, failed], timeout=self._command_timeout_seconds, return_when=asyncio.FIRST_COMPLETED
            )
        except asyncio.CancelledError:
            raise self._fail(f"{name} was interrupted at {what}") from None
        finally:
            failed.cancel()
            unanswered = commanded.cancel()
        if unanswered:
            self._require_life()
            message = f"{name} did not reach {what} within {self._command_timeout_seconds:g} s"
            self._fail(message)
            raise DeadlineError(message)
        try:
            commanded.result()
        except Exception as error:
            raise self._fail(f"{name} failed at {what}: {one_line(error)}") from error

    # Death

    def _fail(self, message: str) -> UnavailableError:
        """Kill the engine unless it has failed already; returns an error with the first reason."""
        if self._failure is None:
            self._failure = message
            self._driver.kill()
        self._failed.set()
        return UnavailableError(self._failure)

    def _require_life(self) -> None:
        if self._failure is not None:
            raise UnavailableError(self._failure)

    def _require_weights(self) -> None:
        self._require_life()
        if self._label not in self._versions:
            raise UnavailableError("the engine has no weights yet; retry after the first weight update")
