"""Whatever a reward function does becomes a score or a failure of its own trajectory, with task, function and cause."""

from __future__ import annotations

import asyncio
import os
import select
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from inference_server.rollout.reward import RewardRunner
from leeway.config import RewardOptions
from leeway.errors import ConfigError
from leeway.service.metrics import InferenceServerMetrics
from leeway.types import TrajectoryFailure
from tests.deadlines import WAIT_SECONDS

pytestmark = pytest.mark.processes

REPOSITORY = Path(__file__).parents[3]
MODULE = "tests.unit.inference_server.rewards"
TASK = {"prompt": "p", "answer": 3}
WHERE = "training task 7"
MEMORY_BYTES = 1 << 30


def runner(function: str, python_path: Path = REPOSITORY, **options: Any) -> RewardRunner:
    reference = function if ":" in function else f"{MODULE}:{function}"
    return RewardRunner(
        reference,
        python_path,
        RewardOptions(**{"processes": 1, "memory_bytes": MEMORY_BYTES, **options}),
        InferenceServerMetrics(CollectorRegistry()),
    )


@asynccontextmanager
async def started(function: str, **options: Any) -> AsyncGenerator[RewardRunner]:
    rewards = runner(function, **options)
    try:
        await rewards.start()
        yield rewards
    finally:
        await rewards.aclose()


def failures(rewards: RewardRunner, cause: str) -> float:
    return rewards._metrics.reward_failures.labels(cause)._value.get()


@pytest.mark.parametrize("function", ["value", "value_later"])
async def test_any_finite_number_is_a_score_and_nothing_else(function: str) -> None:
    async with started(function) as rewards:
        scores = {"float": 0.25, "int": 1, "bool": 1, "float32": 0.25, "numpy bool": 1, "int64": 3, "fraction": 0.25}
        for completion, score in scores.items():
            assert await rewards.score(TASK, completion, WHERE) == score
        for completion, text in {
            "none": "returned a NoneType, not a number,",
            "text": "returned a str, not a number,",
            "list": "returned a list, not a number,",
            "object": "returned a object, not a number,",
            "complex": "returned a complex, not a number,",
            "nan": "returned nan",
            "infinite": "returned -inf",
            "huge": "returned inf",
            "ValueError": "raised ValueError: bad answer",
            "SystemExit": "raised SystemExit: 3",
            "KeyError": "raised KeyError: 'x'",
            "KeyboardInterrupt": "raised KeyboardInterrupt",
        }.items():
            failure = await rewards.score(TASK, completion, WHERE)
            assert failure == TrajectoryFailure(f"reward {MODULE}:{function} {text} on {WHERE}", retryable=False)
        assert (failures(rewards, "invalid"), failures(rewards, "raised")) == (8, 4)


async def test_the_function_sees_task_and_completion_and_each_caller_gets_its_own_score() -> None:
    async with started("number", processes=2) as rewards:
        scores = await asyncio.gather(*(rewards.score(TASK, str(index), WHERE) for index in range(500)))
        assert scores == [3.0 + index for index in range(500)]


@pytest.mark.parametrize(
    ("completion", "text", "cause"),
    [
        ("hang", "took longer than 0.3 s", "timeout"),
        ("spin", "took longer than 0.3 s", "timeout"),
        ("segfault", "crashed with SIGSEGV", "crashed"),
        ("abort", "crashed with SIGABRT", "crashed"),
        ("exit", "ended its process with code 3", "crashed"),
        ("memory", f"raised MemoryError; inference_server.reward.memory_bytes is {MEMORY_BYTES}", "memory"),
        ("creep", f"raised MemoryError; inference_server.reward.memory_bytes is {MEMORY_BYTES}", "memory"),
        ("recursion", "raised RecursionError", "raised"),
    ],
)
async def test_what_hangs_crashes_or_eats_memory_costs_its_own_trajectory(
    completion: str, text: str, cause: str
) -> None:
    timeout_seconds = 0.3 if cause == "timeout" else WAIT_SECONDS
    async with started("misbehave", timeout_seconds=timeout_seconds, processes=2) as rewards:
        workers = [place._worker for place in rewards._places if place._worker is not None]
        failure, *others = await asyncio.gather(
            *(rewards.score(TASK, said, WHERE) for said in (completion, *["fine"] * 8))
        )
        assert isinstance(failure, TrajectoryFailure)
        assert f"reward {MODULE}:misbehave {text}" in failure.message
        assert failure.message.endswith(f" on {WHERE}")
        assert failure.retryable == (cause in ("timeout", "crashed"))
        assert others == [1.0] * 8
        both = await asyncio.gather(*(rewards.score(TASK, "fine", WHERE) for _ in range(2)))  # one in each process
        assert both == [1.0] * 2
        assert failures(rewards, cause) == 1
        blamed = next((worker for worker in workers if worker.ended), None)
        assert (blamed is None) == (cause == "raised")
        assert blamed is None or has_ended(blamed._child.process_id)


@pytest.mark.parametrize("completion", ["segfault", "exit", "memory", "hang", "stubborn", "wait"])
async def test_of_async_calls_in_one_process_only_the_one_to_blame_fails(completion: str, tmp_path: Path) -> None:
    task = TASK | {"file": str(tmp_path / "released")}
    late = completion in ("stubborn", "wait", "hang")
    async with started("misbehave_later", timeout_seconds=0.5 if late else WAIT_SECONDS, concurrency=4) as rewards:
        others = [asyncio.create_task(rewards.score(task, "beside", WHERE)) for _ in range(3)]
        failure = asyncio.create_task(rewards.score(TASK, completion, WHERE))
        await asyncio.wait({failure})
        assert isinstance(failure.result(), TrajectoryFailure)
        (tmp_path / "released").touch()
        scores = await asyncio.gather(*others)
        assert late or scores == [1.0] * 3  # a late one is late when the others are
        assert await rewards.score(task, "beside", WHERE) == 1.0


async def test_a_plain_function_runs_once_in_each_process_and_async_calls_run_together(tmp_path: Path) -> None:
    task = TASK | {"folder": str(tmp_path), "count": 3}
    async with started("at_once", processes=3) as rewards:  # none returns before three run
        assert await asyncio.gather(*(rewards.score(task, str(index), WHERE) for index in range(3))) == [1.0] * 3
    async with started("misbehave", processes=2) as rewards:
        calls = [asyncio.create_task(rewards.score(TASK, "hang", WHERE)) for _ in range(5)]
        await asyncio.wait(calls, timeout=0.2)
        assert [len(place._worker._calls) for place in rewards._places if place._worker] == [1, 1]
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)


async def test_a_cancelled_call_frees_its_place() -> None:
    async with started("misbehave", timeout_seconds=WAIT_SECONDS) as rewards:
        call = asyncio.create_task(rewards.score(TASK, "hang", WHERE))
        await asyncio.wait({call}, timeout=0.05)
        call.cancel()
        await asyncio.wait({call})
        assert await rewards.score(TASK, "fine", WHERE) == 1.0


async def test_what_the_function_prints_or_reads_is_no_part_of_the_protocol() -> None:
    async with started("misbehave") as rewards:
        assert await rewards.score(TASK, "print", WHERE) == 0.0


async def test_a_worker_imports_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import sys\ndef score(task, completion): return float(completion in sys.modules)"
    )
    async with started("mine:score", python_path=tmp_path) as rewards:
        assert await rewards.score(TASK, "json", WHERE) == 1.0
        for heavy in ("torch", "numpy", "grpc", "google.protobuf", "pydantic", "asyncio", "leeway"):
            assert await rewards.score(TASK, heavy, WHERE) == 0.0


@pytest.mark.parametrize(
    ("reference", "content", "expected"),
    [
        ("mine", "", "write module:function"),
        ("mine:score", None, "No module named 'mine'"),
        ("mine:score", "", "score"),
        ("mine:score", "raise ValueError('not\\ntoday')", "ValueError: not today"),
        ("mine:score", "import os; os._exit(7)", "ended its process with code 7"),
        ("mine:score", "import os; os.abort()", "crashed with SIGABRT"),
    ],
)
async def test_a_function_that_cannot_be_imported_is_a_configuration_error(
    tmp_path: Path, reference: str, content: str | None, expected: str
) -> None:
    if content is not None:
        (tmp_path / "mine.py").write_text(content)
    with pytest.raises(ConfigError) as raised:
        await runner(reference if ":" in reference else f"{reference}:", tmp_path).start()
    assert reference in raised.value.message
    assert expected in raised.value.message


async def test_modules_in_the_working_directory_shadow_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("json.py", "numbers.py", "inference_server.py"):
        (tmp_path / name).write_text("raise RuntimeError('shadowed')")
    monkeypatch.chdir(tmp_path)
    async with started("number") as rewards:
        assert await rewards.score(TASK, "1", WHERE) == 4.0


async def test_processes_that_a_killed_function_has_started_end_with_it(tmp_path: Path) -> None:
    task = TASK | {"file": str(tmp_path / "pid")}
    async with started("misbehave", timeout_seconds=1.0) as rewards:
        assert isinstance(await rewards.score(task, "process", WHERE), TrajectoryFailure)
        assert has_ended(int((tmp_path / "pid").read_text()))


def test_workers_end_with_a_server_that_is_killed(tmp_path: Path) -> None:
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.unit.inference_server.killed_server", str(tmp_path / "pid")],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
    )
    with server:
        assert server.stdout is not None
        worker = int(server.stdout.readline())
        ended = os.pidfd_open(worker)
        server.kill()
        readable, _, _ = select.select([ended], [], [], WAIT_SECONDS)
        os.close(ended)
    assert readable, "the worker outlived its server"


def has_ended(process_id: int) -> bool:
    """Whether a process ends within a moment: it was killed, but the kernel may not be done with it."""
    try:
        ended = os.pidfd_open(process_id)
    except ProcessLookupError:
        return True
    readable, _, _ = select.select([ended], [], [], WAIT_SECONDS)
    os.close(ended)
    return bool(readable)
