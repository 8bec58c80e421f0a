"""Processes that can be killed and are replaced within milliseconds: copies of one that has imported everything."""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
from collections.abc import Callable, Mapping
from typing import Any

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.push.learner_process", "tests.push.receiver_process"])

Message = dict[str, Any]


class Child:
    """A process, and JSON messages both ways.

    Args:
        target: called in the process with the pipe's other end and `arguments`.
        arguments: plain values.
        on_message: called in this process's loop with each message.
    """

    def __init__(self, target: Callable[..., None], *arguments: Any, on_message: Callable[[Message], None]) -> None:
        self._pipe, theirs = _FORKS.Pipe()
        self._on_message = on_message
        self._process = _FORKS.Process(target=target, args=(theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()
        self.ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._pipe.fileno(), self._read)

    def send(self, **message: Any) -> None:
        """Tell the process; nothing happens when it is gone."""
        with contextlib.suppress(OSError):  # it died: `ended` says so
            self._pipe.send_bytes(json.dumps(message).encode())

    async def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self._process.kill()
        await self.ended.wait()
        await asyncio.to_thread(self._process.join)

    def _read(self) -> None:
        try:
            while self._pipe.poll():
                self._on_message(json.loads(self._pipe.recv_bytes()))
        except (EOFError, OSError):
            self._loop.remove_reader(self._pipe.fileno())
            self._pipe.close()
            self.ended.set()


def messages(pipe: Any, take: Callable[[Mapping[str, Any]], None]) -> None:
    """In the process: have `take` called with each message that comes, in the running loop; end with the other side."""
    loop = asyncio.get_running_loop()

    def read() -> None:
        try:
            while pipe.poll():
                take(json.loads(pipe.recv_bytes()))
        except (EOFError, OSError):
            loop.remove_reader(pipe.fileno())
            take({"do": "end"})

    loop.add_reader(pipe.fileno(), read)


def tell(pipe: Any, **message: Any) -> None:
    """In the process: a message to whoever started it, on its way when this returns."""
    pipe.send_bytes(json.dumps(message).encode())
