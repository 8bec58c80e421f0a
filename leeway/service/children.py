"""Child processes: how they are started, awaited, stopped and killed. Every process that Leeway starts is one of these.

    start ──> Child ── stdout, stderr, line by line ──> on_stdout, on_stderr
                │ stdin: a pipe for `write`; its end tells the child that its parent is gone
                ├── unless_ended(work)    waits until the child answers, or has ended
                ├── stop(grace_seconds)   SIGTERM, and SIGKILL when it takes too long
                └── wait()                its exit code, when its pipes are closed as well

A child leads a process group of its own, so a Ctrl-C at the terminal reaches its parent alone. When a child ends, what
is left of its group is killed and the pipe to its stdin is closed, which ends what it started in other groups.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import IO, Any, Final, TypeVar

from leeway.service.process import unless_stopped

PIPES_SECONDS: Final = 10.0
"""Longest wait for the pipes of a child that has ended: a process that it started may still hold them."""

T = TypeVar("T")
Output = Callable[[str], None] | IO[Any] | int | None
"""Takes each line without its end; or a file; or None for this process's own."""


def python_command(module: str, *arguments: str, python: str = sys.executable) -> tuple[str, ...]:
    """`python -m module arguments`, with a safe path: modules in the working directory are not importable."""
    return (python, "-P", "-m", module, *arguments)


class Child(asyncio.SubprocessProtocol):
    """One child process; `start` makes it."""

    def __init__(self, outputs: Mapping[int, Callable[[str], None]]) -> None:
        self._outputs = outputs
        self._unfinished = dict.fromkeys(outputs, b"")
        self._transport: asyncio.SubprocessTransport
        self._gone = asyncio.Event()
        self.ended = asyncio.Event()
        self.process_id = 0

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative for a signal."""
        return self._transport.get_returncode()

    async def wait(self) -> int:
        """The exit code, once the child has ended and all that it printed has been read."""
        await self.ended.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PIPES_SECONDS):
                await self._gone.wait()
        self._transport.close()
        code = self.exit_code
        assert code is not None
        return code

    async def unless_ended(self, work: Coroutine[Any, Any, T]) -> T | None:
        """The result of `work`; None when the child ends first, and `work` is cancelled then."""
        return await unless_stopped(self.ended, work)

    def write(self, data: bytes) -> None:
        """Write to its stdin, unless it has ended."""
        pipe = self._transport.get_pipe_transport(0)
        if isinstance(pipe, asyncio.WriteTransport) and not pipe.is_closing():
            pipe.write(data)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process alone, if it still runs."""
        if self.exit_code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process_id, number)

    def signal_group(self, number: signal.Signals) -> None:
        """Send a signal to the process and all of its group, if it still runs."""
        if self.exit_code is None:
            self._signal_group(number)

    def kill(self) -> None:
        """End it and its group at once."""
        self.signal_group(signal.SIGKILL)
        self._close_stdin()

    async def stop(self, grace_seconds: float) -> bool:
        """SIGTERM, then SIGKILL; False when it had to be killed."""
        self.signal(signal.SIGTERM)
        in_time = await self._ends_within(grace_seconds)
        if not in_time:
            self.kill()
        await self.wait()
        return in_time

    async def _ends_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self.ended.wait()
        except TimeoutError:
            return False
        return True

    def _signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process_id, number)

    def _close_stdin(self) -> None:
        pipe = self._transport.get_pipe_transport(0)
        if pipe is not None:
            pipe.close()

    # What the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.SubprocessTransport)
        self._transport = transport
        process_id = transport.get_pid()
        assert process_id is not None
        self.process_id = process_id

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        *lines, self._unfinished[fd] = (self._unfinished[fd] + data).split(b"\n")
        for line in lines:
            self._outputs[fd](line.decode("utf-8", "replace"))

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        if rest := self._unfinished.pop(fd, b""):
            self._outputs[fd](rest.decode("utf-8", "replace"))

    def process_exited(self) -> None:
        self._signal_group(signal.SIGKILL)  # what it left behind
        self._close_stdin()
        self.ended.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._gone.set()


async def start(
    command: Sequence[str],
    *,
    on_stdout: Output = None,
    on_stderr: Output = None,
    environment: Mapping[str, str] | None = None,
) -> Child:
    """Start a command; `environment` is added to this process's own.

    Raises:
        OSError: the command cannot be run.
    """
    outputs = {number: output for number, output in ((1, on_stdout), (2, on_stderr)) if callable(output)}
    _, child = await asyncio.get_running_loop().subprocess_exec(
        lambda: Child(outputs),
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE if callable(on_stdout) else on_stdout,
        stderr=asyncio.subprocess.PIPE if callable(on_stderr) else on_stderr,
        env=None if environment is None else {**os.environ, **environment},
        start_new_session=True,
    )
    return child


@asynccontextmanager
async def running(
    command: Sequence[str], grace_seconds: float, *, on_stdout: Output = None, on_stderr: Output = None
) -> AsyncGenerator[Child]:
    """A child for the length of a block; `grace_seconds` is how long it may take to stop.

    Raises:
        OSError: the command cannot be run.
    """
    child = await start(command, on_stdout=on_stdout, on_stderr=on_stderr)
    try:
        yield child
    finally:
        await child.stop(grace_seconds)
