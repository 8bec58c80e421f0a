"""Reward functions that behave in every way: imported by the worker processes of test_reward.py."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import numpy as np

Task = Mapping[str, Any]

VALUES: Final[dict[str, Any]] = {
    "float": 0.25,
    "int": 1,
    "bool": True,
    "float32": np.float32(0.25),
    "numpy bool": np.bool_(1),
    "int64": np.int64(3),
    "fraction": Fraction(1, 4),
    "none": None,
    "text": "1.0",
    "list": [1.0],
    "object": object(),
    "complex": 1j,
    "nan": float("nan"),
    "infinite": -float("inf"),
    "huge": 10**400,
}
ERRORS: Final[dict[str, BaseException]] = {
    "ValueError": ValueError("bad\nanswer"),
    "SystemExit": SystemExit(3),
    "KeyError": KeyError("x"),
    "KeyboardInterrupt": KeyboardInterrupt(),
}


def value(_task: Task, completion: str) -> Any:
    if completion in ERRORS:
        raise ERRORS[completion]
    return VALUES[completion]


async def value_later(task: Task, completion: str) -> Any:
    await asyncio.sleep(0)
    return value(task, completion)


def number(task: Task, completion: str) -> float:
    return task["answer"] + float(completion)


def misbehave(task: Task, completion: str) -> float:
    """What the completion says; anything unknown scores 1."""
    match completion:
        case "hang":
            threading.Event().wait()
        case "spin":
            while True:
                pass
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "abort":
            os.abort()
        case "exit":
            os._exit(3)
        case "memory":
            bytearray(1 << 31)
        case "creep":
            hoard = [bytearray(1 << 24)]
            while True:
                hoard.append(bytearray(1 << 24))
        case "recursion":
            return misbehave(task, completion)
        case "print":
            sys.stdout.write("no line of the protocol\n")
            sys.stdout.flush()
            return float(len(sys.stdin.read()))
        case "process":
            child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
            Path(task["file"]).write_text(str(child.pid))
            threading.Event().wait()
        case _:
            pass
    return 1.0


async def misbehave_later(task: Task, completion: str) -> float:
    """Scores 1 when released by the file that the task names; a misbehaving completion does not wait."""
    match completion:
        case "stubborn":
            while True:
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    continue
        case "wait":
            await asyncio.Event().wait()
        case "beside":
            await asyncio.to_thread(_until, Path(task["file"]).exists)
        case _:
            return misbehave(task, completion)
    return 1.0


def at_once(task: Task, completion: str) -> float:
    """Returns when the file of a call exists beside its own: calls that run at the same time release each other."""
    folder = Path(task["folder"])
    (folder / completion).touch()
    _until(lambda: sum(1 for _ in folder.iterdir()) == task["count"])
    return 1.0


def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        threading.Event().wait(0.005)


def imported(_task: Task, completion: str) -> float:
    return float(completion in sys.modules)
