"""Whatever a reward function does becomes a score, a named failure, or a clear end."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from inference_server.rollout.reward import RewardRunner
from leeway.config import RewardOptions
from leeway.errors import ExhaustedError
from leeway.service.metrics import InferenceServerMetrics
from leeway.types import TrajectoryFailure
from tests.deadlines import WAIT_SECONDS

TASK = {"prompt": "p", "answer": 3}


def runner(function: Callable[..., Any], **options: Any) -> RewardRunner:
    metrics = InferenceServerMetrics(CollectorRegistry())
    return RewardRunner(function, "mine:score", RewardOptions(**options), metrics)


async def score(function: Callable[..., Any], **options: Any) -> float | TrajectoryFailure:
    return await runner(function, **options).score(TASK, "text", "training task 7")


@pytest.mark.parametrize("value", [0.25, 1, True, np.float32(0.25), np.bool_(1), np.int64(3), Fraction(1, 4)])
async def test_any_finite_number_is_a_score(value: Any) -> None:
    assert await score(lambda _task, _completion: value) == float(value)

    async def later(_task: object, _completion: str) -> Any:
        return value

    assert await score(later) == float(value)


async def test_the_function_sees_task_and_completion() -> None:
    def function(task: dict[str, Any], completion: str) -> int:
        return task["answer"] + len(completion)

    assert await score(function) == 7.0


@pytest.mark.parametrize("value", [None, "1.0", [1.0], object(), 1j])
async def test_what_is_no_number_is_a_failure(value: object) -> None:
    failure = await score(lambda _task, _completion: value)
    assert isinstance(failure, TrajectoryFailure)
    assert not failure.retryable
    assert "mine:score returned a" in failure.message
    assert "training task 7" in failure.message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 10**400])
async def test_what_is_not_finite_is_a_failure(value: float) -> None:
    failure = await score(lambda _task, _completion: value)
    assert isinstance(failure, TrajectoryFailure)
    assert not failure.retryable
    assert "mine:score returned" in failure.message


@pytest.mark.parametrize("error", [ValueError("bad\nanswer"), SystemExit(3), KeyError("x")])
async def test_what_is_raised_is_a_failure_with_one_line(error: BaseException) -> None:
    def function(_task: object, _completion: str) -> float:
        raise error

    async def later(_task: object, _completion: str) -> float:
        raise error

    for variant in (function, later):
        failure = await score(variant)
        assert isinstance(failure, TrajectoryFailure)
        assert not failure.retryable
        assert f"mine:score raised {type(error).__name__}" in failure.message
        assert "training task 7" in failure.message
        assert "\n" not in failure.message


async def test_a_hanging_function_is_abandoned_and_others_go_on() -> None:
    release = threading.Event()

    def function(_task: object, completion: str) -> float:
        if completion == "hang":
            release.wait(WAIT_SECONDS)
        return 1.0

    rewards = runner(function, timeout_seconds=0.05, concurrency=1, max_hung=1)
    failure = await rewards.score(TASK, "hang", "training task 7")
    assert isinstance(failure, TrajectoryFailure)
    assert failure.retryable
    assert "longer than 0.05 s on training task 7" in failure.message
    assert rewards.num_hung == 1
    rewards._options = RewardOptions(timeout_seconds=WAIT_SECONDS, concurrency=1, max_hung=1)
    assert await rewards.score(TASK, "fast", "training task 8") == 1.0
    release.set()
    while rewards.num_hung:  # the abandoned thread returns and is no longer counted
        assert await rewards.score(TASK, "fast", "training task 8") == 1.0
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "reward")


async def test_too_many_hanging_calls_end_the_server_with_a_line() -> None:
    release = threading.Event()
    rewards = runner(
        lambda _task, _completion: release.wait(WAIT_SECONDS), timeout_seconds=0.02, concurrency=2, max_hung=2
    )
    for _ in range(2):
        assert isinstance(await rewards.score(TASK, "x", "training task 7"), TrajectoryFailure)
    with pytest.raises(ExhaustedError, match="3 calls of reward mine:score still run"):
        await rewards.score(TASK, "x", "training task 7")
    release.set()


async def test_an_async_function_that_ignores_cancellation_counts_as_hung() -> None:
    release = asyncio.Event()

    async def function(_task: object, _completion: str) -> float:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue
        return 1.0

    rewards = runner(function, timeout_seconds=0.02)
    failure = await rewards.score(TASK, "x", "training task 7")
    assert isinstance(failure, TrajectoryFailure)
    assert failure.retryable
    assert rewards.num_hung == 1
    release.set()
    while rewards.num_hung:
        await asyncio.wait(set(rewards._hung_tasks), timeout=1)


@pytest.mark.parametrize("is_async", [False, True])
async def test_no_more_than_the_limit_run_at_once(is_async: bool) -> None:
    running = 0
    most = 0
    lock = threading.Lock()

    def begin() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)

    def end() -> None:
        nonlocal running
        with lock:
            running -= 1

    barrier = threading.Barrier(3)

    def function(_task: object, _completion: str) -> float:
        begin()
        barrier.wait(WAIT_SECONDS)  # three at once, or nobody gets on
        end()
        return 0.0

    async def later(_task: object, _completion: str) -> float:
        begin()
        await asyncio.sleep(0)
        end()
        return 0.0

    rewards = runner(later if is_async else function, concurrency=3)
    await asyncio.gather(*(rewards.score(TASK, "x", "training task 7") for _ in range(9)))
    assert most == 3


async def test_scores_go_to_those_who_asked() -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        rewards = runner(lambda _task, completion: int(completion), concurrency=4)
        scores = await asyncio.gather(*(rewards.score(TASK, str(i), "training task 7") for i in range(500)))
    finally:
        sys.setswitchinterval(interval)
    assert scores == [float(i) for i in range(500)]


async def test_a_cancelled_call_frees_its_place() -> None:
    release = threading.Event()

    def function(_task: object, completion: str) -> float:
        if completion == "hang":
            release.wait(WAIT_SECONDS)
        return 1.0

    rewards = runner(function, concurrency=1)
    call = asyncio.create_task(rewards.score(TASK, "hang", "training task 7"))
    while not rewards._threads._num_calls:
        await asyncio.wait({call}, timeout=0.005)
    call.cancel()
    await asyncio.wait({call})
    assert await rewards.score(TASK, "fast", "training task 8") == 1.0
    release.set()
