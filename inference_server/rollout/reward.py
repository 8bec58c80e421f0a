"""Scores completions with the user's reward function, in processes that can be killed.

    score ──> slot ──> worker process with the fewest calls ── call ──> reward_worker ── answer ──> reward or failure
                         ▲                                       │
                         └── started again <── killed, or dead ──┴──> failure that names task, function and cause

Whatever the function does costs its own trajectory only: it may raise, return no number, never return, exhaust its
memory, exit or crash. A plain function has a process to itself while it runs. Several calls of an async function share
a process; when that dies, each of them is repeated in a process of its own, so that only the one to blame fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from leeway.config import RewardOptions
from leeway.errors import ConfigError, DeadlineError
from leeway.service.children import Child, python_command
from leeway.service.children import start as start_child
from leeway.service.metrics import InferenceServerMetrics
from leeway.service.plugins import split_reference
from leeway.tasks import Task
from leeway.types import TrajectoryFailure

_START_SECONDS: Final = 300.0
"""Longest import of the function's module."""
_GRACE_SECONDS: Final = 1.0
"""An async function's timeout is enforced in its process; one that answers so much later still is killed."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """The answer to a call: a reward, or a cause with a text that follows the function's name."""

    reward: float | None
    cause: str = ""
    text: str = ""


class _WorkerDied(Exception):
    """A worker process ended with calls open."""

    def __init__(self, answer: _Answer, num_calls: int) -> None:
        super().__init__(answer.text)
        self.answer = answer
        self.num_calls = num_calls


class RewardRunner:
    """Calls `function(task, completion)`, sync or async, in worker processes.

    Args:
        reference: the function, as `module:function`.
        python_path: folder that is searched for the module first.
        options: processes, timeout, memory.
        metrics: takes the time of each call, and counts failures by cause.

    Raises:
        ConfigError: the reference does not have that form.
    """

    def __init__(
        self, reference: str, python_path: Path, options: RewardOptions, metrics: InferenceServerMetrics
    ) -> None:
        self._reference = reference
        self._options = options
        self._metrics = metrics
        module, function = split_reference(reference)
        self._orders = json.dumps(
            {
                "server": os.getpid(),
                "module": module,
                "function": function,
                "python_path": str(python_path),
                "timeout_seconds": options.timeout_seconds,
                "memory_bytes": options.memory_bytes,
            }
        )
        self._places = [_Place(self._start_worker) for _ in range(options.processes)]
        self._slots = asyncio.Semaphore(options.processes)
        self._call_seconds = options.timeout_seconds

    async def start(self) -> None:
        """Start the workers, which import the function.

        Raises:
            ConfigError: it cannot be imported.
        """
        workers = await asyncio.gather(*(place.worker() for place in self._places))
        if workers[0].is_async:
            self._slots = asyncio.Semaphore(self._options.concurrency)
            self._call_seconds += _GRACE_SECONDS

    async def aclose(self) -> None:
        """Kill the workers."""
        await asyncio.gather(*(place.aclose() for place in self._places))

    async def score(self, task: Task, completion: str, where: str) -> float | TrajectoryFailure:
        """The reward, or why there is none.

        Args:
            task: as loaded; it reaches the function as JSON has it.
            completion: decoded text.
            where: names the task in messages, for example "training task 17".

        Raises:
            ConfigError, DeadlineError: no worker can be started any more.
        """
        async with self._slots:
            started_at = time.perf_counter()
            try:
                answer = await self._call(task, completion)
            finally:
                self._metrics.reward_seconds.observe(time.perf_counter() - started_at)
        if answer.reward is not None:
            return answer.reward
        self._metrics.reward_failures.labels(answer.cause).inc()
        # What the function itself answered, it would answer again; a process may have died of something else.
        retryable = answer.cause in ("timeout", "crashed")
        return TrajectoryFailure(f"reward {self._reference} {answer.text} on {where}", retryable=retryable)

    async def _call(self, task: Task, completion: str) -> _Answer:
        place = min(self._places, key=lambda place: place.num_calls)
        try:
            async with place.taken() as worker:
                return await worker.call(task, completion, self._call_seconds)
        except _WorkerDied as died:
            if died.num_calls == 1:
                return died.answer
        worker = await self._start_worker()  # which call was to blame is not known: each is repeated alone
        try:
            return await worker.call(task, completion, self._call_seconds)
        except _WorkerDied as died:
            return died.answer
        finally:
            await worker.aclose()

    async def _start_worker(self) -> _Worker:
        worker = _Worker(self._options)
        await worker.start(self._orders, self._reference)
        return worker


class _Place:
    """Where one worker process runs; it is started again when it has ended."""

    def __init__(self, start_worker: Callable[[], Awaitable[_Worker]]) -> None:
        self._start_worker = start_worker
        self._starting = asyncio.Lock()
        self._worker: _Worker | None = None
        self.num_calls = 0

    @contextlib.asynccontextmanager
    async def taken(self) -> AsyncGenerator[_Worker]:
        self.num_calls += 1
        try:
            yield await self.worker()
        finally:
            self.num_calls -= 1

    async def worker(self) -> _Worker:
        async with self._starting:
            if self._worker is None or self._worker.ended:
                self._worker = await self._start_worker()
            return self._worker

    async def aclose(self) -> None:
        async with self._starting:
            if self._worker is not None:
                await self._worker.aclose()


class _Worker:
    """One worker process, and the calls that it has not answered."""

    def __init__(self, options: RewardOptions) -> None:
        self._options = options
        self._calls: dict[int, asyncio.Future[_Answer]] = {}
        self._numbers = itertools.count()
        self._ready: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self.is_async = False
        self.ended = False

    async def start(self, orders: str, reference: str) -> None:
        """Start the process and wait until it has imported the function.

        Raises:
            ConfigError: the import fails, or ends the process.
            DeadlineError: the import takes too long.
        """
        command = python_command("inference_server.rollout.reward_worker", orders)
        self._child: Child = await start_child(command, on_stdout=self._on_line)
        self._watching = asyncio.create_task(self._watch(), name="reward worker")
        try:
            async with asyncio.timeout(_START_SECONDS):
                is_async, *problem = await self._ready
        except _WorkerDied as died:
            raise ConfigError(f"{reference}: while its module was imported, it {died.answer.text}") from None
        except BaseException as error:
            await self.aclose()
            if isinstance(error, TimeoutError):
                raise DeadlineError(
                    f"{reference}: its module took longer than {_START_SECONDS:g} s to import"
                ) from None
            raise
        if problem:
            await self.aclose()
            raise ConfigError(f"{reference}: cannot be imported from task.python_path: {problem[0]}")
        self.is_async = is_async

    async def aclose(self) -> None:
        """Kill the process, and whatever it has started."""
        self._kill()
        await asyncio.wait([self._watching])

    async def call(self, task: Task, completion: str, timeout_seconds: float) -> _Answer:
        """Call the function.

        Raises:
            _WorkerDied: the process ended before it answered, or was killed because it did not answer in time.
        """
        number = next(self._numbers)
        answer = self._calls[number] = asyncio.get_running_loop().create_future()
        self._child.write(json.dumps([number, task, completion]).encode() + b"\n")
        try:
            async with asyncio.timeout(timeout_seconds):
                answered = await answer
        except TimeoutError:
            self._kill()
            raise _WorkerDied(self._late(), len(self._calls)) from None
        except asyncio.CancelledError:
            if not self.is_async:
                self._kill()  # the next call must not wait for an unwanted result
            raise
        if answered.cause == "timeout":
            return self._late()
        if answered.cause == "memory":
            self._kill()  # who knows what else of it has failed
            text = f"{answered.text}; inference_server.reward.memory_bytes is {self._options.memory_bytes}"
            return _Answer(None, "memory", text)
        return answered

    def _late(self) -> _Answer:
        return _Answer(None, "timeout", f"took longer than {self._options.timeout_seconds:g} s")

    def _kill(self) -> None:
        self.ended = True
        self._child.kill()

    def _on_line(self, line: str) -> None:
        message = json.loads(line)
        if not self._ready.done():
            self._ready.set_result(message)
            return
        number, *answered = message
        answer = self._calls.pop(number)
        if not answer.done():  # otherwise its caller was cancelled
            answer.set_result(_Answer(*answered))

    async def _watch(self) -> None:
        code = await self._child.wait()
        self.ended = True
        how = f"crashed with {signal.Signals(-code).name}" if code < 0 else f"ended its process with code {code}"
        died = _WorkerDied(_Answer(None, "crashed", how), len(self._calls))
        for waiting in (self._ready, *self._calls.values()):
            if not waiting.done():
                waiting.set_exception(died)
