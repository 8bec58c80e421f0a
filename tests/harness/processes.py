"""The processes that tests start.

    start, running, leeway     python -m MODULE ARGUMENTS, as a person runs it; output goes to a pipe or a log file
    Child                      a function in a process forked from the fork server, which has imported everything:
                               started in milliseconds, with a log file and JSON messages both ways

The fork server is multiprocessing's. It runs no event loop and opens no connection, and it must have a single thread:
each child looks at that before it does anything else, so that a thread somewhere is a refusal instead of a rare hang.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from leeway.rpc import cancel_and_wait
from leeway.service.children import python_command
from tests.deadlines import RUN_SECONDS, WAIT_SECONDS

ROOT: Final = Path(__file__).parents[2]
CLI: Final = "leeway.cli.main"

# Programs


def leeway(*arguments: str, directory: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`leeway ARGUMENTS`, from its start to its end."""
    return subprocess.run(
        python_command(CLI, *arguments),
        cwd=directory,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
        check=False,
    )


def overriding(overrides: Sequence[str]) -> list[str]:
    """The `--set` arguments for some keys."""
    return [part for override in overrides for part in ("--set", override)]


async def start(
    command: Sequence[str], *, log: Path | None = None, directory: Path = ROOT
) -> asyncio.subprocess.Process:
    """Start a program; its output goes to `log`, or else to pipes."""
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(log.open("ab")) if log is not None else asyncio.subprocess.PIPE
        return await asyncio.create_subprocess_exec(
            *command, cwd=directory, stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output
        )


def module(name: str, *arguments: str) -> list[str]:
    """The command `python -m NAME ARGUMENTS`."""
    return [sys.executable, "-m", name, *arguments]


@asynccontextmanager
async def running(name: str, *arguments: str) -> AsyncGenerator[asyncio.subprocess.Process]:
    """`python -m NAME ARGUMENTS`, killed at the end of the block unless it has ended."""
    process = await start(module(name, *arguments))
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        # Its children hold its pipes' other ends no longer than they live.
        await process.communicate()


async def output_of(name: str, *arguments: str) -> tuple[int, str]:
    """`python -m NAME ARGUMENTS`, from its start to its end: exit code and output."""
    async with running(name, *arguments) as process:
        stdout, stderr = await process.communicate()
    assert process.returncode is not None
    return process.returncode, (stdout + stderr).decode()


async def ended(processes: Mapping[str, asyncio.subprocess.Process]) -> dict[str, int]:
    """The exit codes of processes that end by themselves; one that does not is killed."""
    waiting = {name: asyncio.create_task(process.wait()) for name, process in processes.items()}
    if waiting:
        await asyncio.wait(waiting.values(), timeout=WAIT_SECONDS)
    for name, process in processes.items():
        if process.returncode is None:
            process.kill()
            await cancel_and_wait(waiting[name])
            await process.wait()
    return {name: process.returncode or 0 for name, process in processes.items()}


def children_of(process_id: int) -> list[int]:
    """The processes that a process has started and that live."""
    return [int(child) for child in Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split()]


def command_line(process_id: int) -> list[str]:
    """The arguments of a process."""
    return Path(f"/proc/{process_id}/cmdline").read_text().split("\0")


# Children of the fork server

_FORKS: Final = multiprocessing.get_context("forkserver")
Message = dict[str, Any]
Target = Callable[..., int | None]


def preload(*modules: str) -> None:
    """Have the fork server import these when it starts."""
    _FORKS.set_forkserver_preload(list(modules))


class Child:
    """A function in a process of its own.

    Its standard input is the pipe of the messages, which ends when this process does.

    Args:
        target: called in the process as `target(connection, *arguments)`; returns its exit code.
        arguments: plain values.
        log: where the process's output goes.
    """

    def __init__(self, target: Target, *arguments: Any, log: str | os.PathLike[str] = os.devnull) -> None:
        self.connection, theirs = _FORKS.Pipe()
        self._log = Path(log)
        self._process = _FORKS.Process(target=_become, args=(theirs, os.fspath(log), target, arguments), daemon=True)
        with _single_threaded():
            self._process.start()
        theirs.close()
        self.stopped = False
        self.gone = False

    @property
    def sentinel(self) -> int:
        """Readable when the process has ended."""
        return self._process.sentinel

    def send(self, **message: Any) -> None:
        """Tell the process something; nothing happens when it is gone."""
        with contextlib.suppress(OSError):
            self.connection.send_bytes(json.dumps(message).encode())

    def received(self) -> list[Message]:
        """The messages that have come.

        Raises:
            EOFError: the process has ended, and all of them were read.
        """
        messages: list[Message] = []
        try:
            while self.connection.poll():
                messages.append(json.loads(self.connection.recv_bytes()))
        except (EOFError, OSError):
            if not messages:
                raise EOFError from None
        return messages

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens when it is gone."""
        if not self.gone and self._process.exitcode is None and self._process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, number)
        self.stopped = (self.stopped or number is signal.SIGSTOP) and number is not signal.SIGCONT

    def wait(self) -> int:
        """Wait for its end, and let go of it: the exit code, negative for a signal."""
        self._process.join()
        code = self._process.exitcode
        assert code is not None
        self._process.close()
        self.connection.close()
        self.gone = True
        return code

    def last_line(self) -> str:
        """The last line that it, or one before it, has printed."""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it printed nothing"


class AsyncChild(Child):
    """A child whose messages and end are heard in the running loop.

    Args:
        on_message: called with each message.
        on_end: called when the process has ended.
    """

    def __init__(
        self,
        target: Target,
        *arguments: Any,
        on_message: Callable[[Message], None],
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(target, *arguments)
        self.ended = asyncio.Event()
        self._on_message = on_message
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self.connection.fileno(), self._read)

    async def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        if not self.gone:
            self.signal(signal.SIGKILL)
            await self.ended.wait()
            await asyncio.to_thread(self.wait)

    def _read(self) -> None:
        try:
            for message in self.received():
                self._on_message(message)
        except EOFError:
            self._loop.remove_reader(self.connection.fileno())
            self.ended.set()
            self._on_end()


def hear(connection: Any, take: Callable[[Message], None]) -> None:
    """In a child: call `take` with each message that comes, and with {"do": "end"} when the other side is gone."""
    loop = asyncio.get_running_loop()

    def read() -> None:
        try:
            while connection.poll():
                take(json.loads(connection.recv_bytes()))
        except (EOFError, OSError):
            loop.remove_reader(connection.fileno())
            take({"do": "end"})

    loop.add_reader(connection.fileno(), read)


def tell(connection: Any, **message: Any) -> None:
    """In a child: a message to the process that started it, which is sent when this returns."""
    connection.send_bytes(json.dumps(message).encode())


@contextlib.contextmanager
def _single_threaded() -> Generator[None]:
    """What the fork server imports when it starts must not make threads: OpenBLAS would, one for each core."""
    name = "OPENBLAS_NUM_THREADS"
    before = os.environ.get(name)  # noqa: TID251 (the fork server inherits it)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _become(connection: Any, log: str, target: Target, arguments: Sequence[Any]) -> None:
    """Never returns."""
    code = 70
    try:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        os.dup2(connection.fileno(), 0)
        sys.stdin = os.fdopen(0)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        threads = list(Path(f"/proc/{os.getppid()}/task").iterdir())
        assert len(threads) == 1, f"the fork server has {len(threads)} threads: a fork of it may hang"
        code = target(connection, *arguments) or 0
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 1
    except BaseException:  # noqa: BLE001 (a process boundary: the traceback goes to its log)
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
