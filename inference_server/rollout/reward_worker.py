"""A process that calls the reward function: `python -m inference_server.rollout.reward_worker ORDERS`.

    stdin ── [number, task, completion] ──> function ── [number, reward, cause, text] ──> stdout    one JSON line each

The first line on stdout is [true if the function is async], or [null, problem] when it cannot be imported. A plain
function is called once at a time; an async one as often as the server sends calls. Besides the user's module only the
standard library is imported, so that a worker starts in a moment. What the function prints goes to the server's log.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import inspect
import io
import json
import math
import numbers
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any, Final, cast

_PR_SET_PDEATHSIG: Final = 1

Answer = tuple[float | None, str, str]
"""The reward, or None with a cause (raised, invalid, memory, timeout) and a text that follows the function's name."""


def main() -> None:
    """Serve calls until stdin ends, which it does when the server is gone."""
    orders = json.loads(sys.argv[1])
    _die_with(orders["server"])
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the server's to handle
    calls = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_DATA, (orders["memory_bytes"], orders["memory_bytes"]))
    try:
        sys.path.insert(0, orders["python_path"])
        function: Callable[..., Any] = getattr(importlib.import_module(orders["module"]), orders["function"])
    except BaseException as error:  # noqa: BLE001  (a user's module: whatever its import raises is the answer)
        _write(answers, [None, _one_line(error)])
        return
    is_async = _is_async(function)
    _write(answers, [is_async])
    if is_async:
        import asyncio  # takes as long to import as all the rest

        asyncio.run(_serve_async(function, orders["timeout_seconds"], calls, answers))
        return
    for line in calls:
        number, task, completion = json.loads(line)
        try:
            answer = _judged(function(task, completion))
        except BaseException as error:  # noqa: BLE001  (a user's function: whatever it raises is its answer)
            answer = _raised(error)
        _write(answers, [number, *answer])


async def _serve_async(
    function: Callable[..., Any], timeout_seconds: float, calls: io.BufferedReader, answers: io.FileIO
) -> None:
    import asyncio

    async def answer(number: int, task: object, completion: str) -> None:
        limit = asyncio.timeout(timeout_seconds)
        try:
            async with limit:
                answered = _judged(await function(task, completion))
        except BaseException as error:  # noqa: BLE001  (a user's function: whatever it raises is its answer)
            late = isinstance(error, TimeoutError) and limit.expired()
            answered = (None, "timeout", "") if late else _raised(error)
        _write(answers, [number, *answered])

    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=sys.maxsize // 2)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), calls)
    open_calls: set[asyncio.Task[None]] = set()
    while line := await reader.readline():
        call = asyncio.create_task(answer(*json.loads(line)))
        open_calls.add(call)
        call.add_done_callback(open_calls.discard)
    os._exit(0)  # the server is gone; open calls may ignore their cancellation


def _is_async(function: Callable[..., Any]) -> bool:
    called: object = getattr(function, "__call__", None)  # noqa: B004  (the method itself, to see whether it is async)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(called)


def _judged(value: object) -> Answer:
    """The answer that a returned value stands for."""
    numpy = sys.modules.get("numpy")
    if not isinstance(value, numbers.Real) and not (numpy is not None and isinstance(value, numpy.bool_)):
        return None, "invalid", f"returned a {type(value).__name__}, not a number,"
    try:
        reward = float(cast("float", value))
    except OverflowError:
        reward = math.inf
    if not math.isfinite(reward):
        return None, "invalid", f"returned {reward}"
    return reward, "", ""


def _raised(error: BaseException) -> Answer:
    return None, "memory" if isinstance(error, MemoryError) else "raised", f"raised {_one_line(error)}"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _write(answers: io.FileIO, answer: list[object]) -> None:
    answers.write(json.dumps(answer).encode() + b"\n")  # one write of less than a pipe holds: never in pieces


def _die_with(server: int) -> None:
    """Have the kernel kill this process when the server is gone, however it ended."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != server:
        sys.exit("the inference server that started this reward worker is gone")


if __name__ == "__main__":
    main()
