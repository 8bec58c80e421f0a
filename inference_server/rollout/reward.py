"""Runs a user's reward function so that whatever it does becomes a score, a failure with a name, or a clear end.

    score ──> slot (at most `concurrency`) ──> async function: a task of this loop
                                          └──> plain function: a daemon thread, reused; one that hangs is abandoned and
                                               replaced, counted, and too many of them end the process

Threads deliver results in batches: under load one wake-up of the loop carries many scores.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import numbers
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from leeway.config import RewardOptions
from leeway.errors import ExhaustedError
from leeway.service.metrics import InferenceServerMetrics
from leeway.tasks import Task
from leeway.types import TrajectoryFailure


class RewardRunner:
    """Scores completions with `function(task, completion)`, sync or async.

    Args:
        function: the user's; returns a finite number.
        name: its `module:function`, for messages.
        options: timeout and concurrency.
        metrics: takes the time of each call.
    """

    def __init__(
        self, function: Callable[..., Any], name: str, options: RewardOptions, metrics: InferenceServerMetrics
    ) -> None:
        self._function = function
        self._name = name
        self._options = options
        self._seconds = metrics.reward_seconds
        self._slots = asyncio.Semaphore(options.concurrency)
        self._is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            getattr(function, "__call__", None)  # noqa: B004  (the method itself, to see whether it is async)
        )
        self._threads = _Threads(function, options.concurrency)
        self._hung_tasks: set[asyncio.Task[Any]] = set()

    @property
    def num_hung(self) -> int:
        """Calls that outlived their timeout and still run."""
        return len(self._hung_tasks) + self._threads.num_abandoned

    async def score(self, task: Task, completion: str, where: str) -> float | TrajectoryFailure:
        """The reward, or why there is none.

        Args:
            task: as loaded.
            completion: decoded text.
            where: names the task in messages, for example "training task 17".

        Raises:
            ExhaustedError: more than `max_hung` calls hang; nothing more can be scored.
        """
        value: Any
        async with self._slots:
            started_at = time.perf_counter()
            try:
                if self._is_async:
                    value = await self._call_async(task, completion)
                else:
                    value = await self._threads.call(task, completion, self._options.timeout_seconds)
            except TimeoutError:
                self._check_hung()
                seconds = self._options.timeout_seconds
                return TrajectoryFailure(
                    f"reward {self._name} took longer than {seconds:g} s on {where}", retryable=True
                )
            finally:
                self._seconds.observe(time.perf_counter() - started_at)
        if isinstance(value, _Raised):
            return TrajectoryFailure(f"reward {self._name} raised {value.text} on {where}", retryable=False)
        if not isinstance(value, (numbers.Real, np.bool_)):
            kind = type(value).__name__
            return TrajectoryFailure(
                f"reward {self._name} returned a {kind}, not a number, on {where}", retryable=False
            )
        try:
            reward = float(cast("float", value))
        except OverflowError:
            reward = math.inf
        if not math.isfinite(reward):
            return TrajectoryFailure(f"reward {self._name} returned {reward} on {where}", retryable=False)
        return reward

    async def _call_async(self, task: Task, completion: str) -> object:
        call = asyncio.create_task(_guarded(self._function, task, completion))
        try:
            done, _ = await asyncio.wait([call], timeout=self._options.timeout_seconds)
        finally:
            if not call.done():
                # It may ignore the cancellation: nobody waits for it.
                call.cancel()
                self._hung_tasks.add(call)
                call.add_done_callback(self._hung_tasks.discard)
        if not done:
            raise TimeoutError
        return call.result()

    def _check_hung(self) -> None:
        if self.num_hung > self._options.max_hung:
            raise ExhaustedError(
                f"{self.num_hung} calls of reward {self._name} still run after their timeout of "
                f"{self._options.timeout_seconds:g} s; make it return, or raise inference_server.reward_timeout_seconds"
            )


@dataclass(frozen=True, slots=True)
class _Raised:
    """What a reward function raised, as one line."""

    text: str

    @classmethod
    def of(cls, error: BaseException) -> _Raised:
        return cls(" ".join(f"{type(error).__name__}: {error}".split())[:300])


async def _guarded(function: Callable[..., Any], task: Task, completion: str) -> object:
    try:
        return await function(task, completion)
    except (Exception, SystemExit) as error:  # noqa: BLE001  (a user's function: anything it raises is its answer)
        return _Raised.of(error)


@dataclass(slots=True, eq=False)
class _Call:
    task: Task
    completion: str
    answer: asyncio.Future[object] = field(repr=False)
    abandoned: bool = False


class _Threads:
    """Daemon threads that call a plain function; made when needed, at most `limit` that are not abandoned."""

    def __init__(self, function: Callable[..., Any], limit: int) -> None:
        self._function = function
        self._limit = limit
        self._calls: queue.SimpleQueue[_Call] = queue.SimpleQueue()
        self._done: deque[tuple[_Call, object]] = deque()
        self._delivering = False
        self._num_threads = 0
        self._num_calls = 0
        self.num_abandoned = 0

    async def call(self, task: Task, completion: str, timeout_seconds: float) -> object:
        """The function's value, or what it raised.

        Raises:
            TimeoutError: it did not return in time; its thread is left to itself.
        """
        loop = asyncio.get_running_loop()
        call = _Call(task, completion, loop.create_future())
        self._num_calls += 1
        if self._num_calls > self._num_threads and self._num_threads < self._limit:
            self._num_threads += 1
            threading.Thread(target=self._serve, args=(loop,), name="reward", daemon=True).start()
        self._calls.put(call)
        try:
            async with asyncio.timeout(timeout_seconds):
                return await call.answer
        finally:
            self._num_calls -= 1
            if not call.answer.done() or call.answer.cancelled():
                call.abandoned = True
                self.num_abandoned += 1
                self._num_threads -= 1

    def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        while True:
            call = self._calls.get()
            try:
                value: object = self._function(call.task, call.completion)
            except (Exception, SystemExit) as error:  # noqa: BLE001  (a user's function: what it raises is its answer)
                value = _Raised.of(error)
            self._done.append((call, value))
            if not self._delivering:
                self._delivering = True
                with suppress(RuntimeError):  # the loop is closed: the process ends
                    loop.call_soon_threadsafe(self._deliver)
            if call.abandoned:
                return

    def _deliver(self) -> None:
        # In this order: what is appended after the flag falls schedules its own delivery.
        self._delivering = False
        while self._done:
            call, value = self._done.popleft()
            if call.abandoned:
                self.num_abandoned -= 1
            elif not call.answer.done():
                call.answer.set_result(value)
