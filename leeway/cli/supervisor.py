"""Processes of one run: started, watched, started again when they die, stopped in order.

    replay buffer, learner, servers: each kept alive by its own task ── exits ──> restart with backoff, or the end
    learner's stdout ──> on_journal_line          every stderr ──> logs/NAME.log

    the end    learner exits 0           the run is finished (or it was stopped): servers, then the buffer are stopped
               `stop` is set             the buffer is stopped last, so that checkpoint and rollouts reach it;
                                         whoever cannot wait for that calls `kill`
               a process exits 2         a restart would meet the same error: everything stops with its last line
               too many restarts         likewise

Services wait for each other by themselves, so they start together. Children hold the other end of a pipe: they stop
when the supervisor is gone.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from leeway.rpc import Backoff, cancel_and_wait
from leeway.service.process import EXIT_OK, EXIT_REFUSED

OTHERS_STOP_SECONDS: Final = 2.0
_KILLED_SECONDS: Final = 10.0
"""How long the end of a process that was killed is waited for."""
_FIRST_PAUSE_SECONDS: Final = 0.25
_LONGEST_PAUSE_SECONDS: Final = 8.0
_RESTART_WINDOW_SECONDS: Final = 120.0
_MAX_RESTARTS: Final = 10
"""Restarts of one service within the window before the supervisor gives up."""


@dataclass(frozen=True, slots=True)
class Service:
    """One process: `python -m argv[0] argv[1:]`; `python` is this interpreter unless the service needs another."""

    name: str
    argv: tuple[str, ...]
    python: str = sys.executable


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the run ended; `error` is empty when it ended well."""

    error: str = ""
    refused: bool = False


@dataclass(slots=True)
class _Child:
    """A service and its current process."""

    service: Service
    process: asyncio.subprocess.Process | None = None
    last_line: str = ""
    restarts: deque[float] = field(default_factory=deque[float])
    stopping: bool = False


class Supervisor:
    """Keeps the processes of one run alive."""

    def __init__(
        self,
        *,
        replay_buffer: Service,
        learner: Service,
        servers: Sequence[Service],
        learner_stop_seconds: float,
        log_directory: Path,
        on_journal_line: Callable[[str], None],
        on_event: Callable[[str], None],
    ) -> None:
        self._buffer = _Child(replay_buffer)
        self._learner = _Child(learner)
        self._servers = [_Child(service) for service in servers]
        self._learner_stop_seconds = learner_stop_seconds
        self._log_directory = log_directory
        self._on_journal_line = on_journal_line
        self._on_event = on_event
        self._trained = False  # whether the learner has anything to save

    def process_id(self, name: str) -> int | None:
        """The running process of a service; None while it has none."""
        child = next(child for child in [self._buffer, self._learner, *self._servers] if child.service.name == name)
        return child.process.pid if child.process is not None and child.process.returncode is None else None

    def kill(self) -> None:
        """End every process at once; `run` then returns."""
        for child in [self._buffer, self._learner, *self._servers]:
            child.stopping = True
            _signal(child, signal.SIGKILL)

    async def run(self, stop: asyncio.Event) -> Outcome:
        """Run until the learner is done, a process cannot go on, or `stop` is set."""
        self._log_directory.mkdir(parents=True, exist_ok=True)
        learner_task = asyncio.create_task(self._keep(self._learner))
        keepers = [learner_task, *(asyncio.create_task(self._keep(child)) for child in [self._buffer, *self._servers])]
        stopping = asyncio.create_task(stop.wait())
        outcome = Outcome()
        pending: set[asyncio.Task[Any]] = {*keepers, stopping}
        while not (outcome.error or stopping.done() or learner_task.done()):
            _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            ended = [keeper.result() for keeper in keepers if keeper.done()]
            outcome = next((result for result in ended if result.error), outcome)
        outcome = await self._stop_all(learner_task, outcome)
        for task in [*keepers, stopping]:
            await cancel_and_wait(task)
        return outcome

    async def _stop_all(self, learner_task: asyncio.Task[Outcome], outcome: Outcome) -> Outcome:
        """Learner and servers while the buffer still lives; the buffer last."""
        if learner_task.done():
            await self._stop(self._servers, OTHERS_STOP_SECONDS)
        else:
            if self._trained:
                self._on_event("stopping: the learner writes a checkpoint")
            grace_seconds = self._learner_stop_seconds if self._trained else OTHERS_STOP_SECONDS
            await self._stop([self._learner, *self._servers], grace_seconds)
            if learner_task.done() and not outcome.error:
                outcome = learner_task.result()
        await self._stop([self._buffer], OTHERS_STOP_SECONDS)
        return outcome

    async def _stop(self, children: Sequence[_Child], grace_seconds: float) -> None:
        running = [child for child in children if child.process is not None and child.process.returncode is None]
        for child in children:
            child.stopping = True
        for child in running:
            _signal(child, signal.SIGTERM)
        exits = [asyncio.create_task(child.process.wait()) for child in running if child.process is not None]
        if not exits:
            return
        _, late = await asyncio.wait(exits, timeout=grace_seconds)
        for child in running:
            if child.process is not None and child.process.returncode is None:
                if self._trained:
                    self._on_event(f"{child.service.name} did not stop within {grace_seconds:g} s and was killed")
                _signal(child, signal.SIGKILL)
        if late:  # a process that it started may hold its pipes, and then its end is not seen
            _, late = await asyncio.wait(late, timeout=_KILLED_SECONDS)
        for unseen in late:
            unseen.cancel()
        await asyncio.sleep(0)  # let the keepers see the exits

    async def _keep(self, child: _Child) -> Outcome:
        """Start a service and start it again, until it ends by itself or cannot go on."""
        name = child.service.name
        while True:
            code = await self._run_once(child)
            if code == EXIT_OK or child.stopping:
                return Outcome()
            if code == EXIT_REFUSED:
                return Outcome(child.last_line or f"{name} refused to start", refused=True)
            now = time.monotonic()
            child.restarts.append(now)
            while child.restarts[0] < now - _RESTART_WINDOW_SECONDS:
                child.restarts.popleft()
            if len(child.restarts) > _MAX_RESTARTS:
                return Outcome(
                    f"{name} died {len(child.restarts)} times within {_RESTART_WINDOW_SECONDS:.0f} s; "
                    f"its last line: {child.last_line or 'none'}"
                )
            backoff = Backoff(_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS, num_failures=len(child.restarts) - 1)
            pause_seconds = backoff.next_seconds()
            self._on_event(f"{name} {_how_it_ended(code)}; starting it again in {pause_seconds:g} s")
            await asyncio.sleep(pause_seconds)
            if child.stopping:
                return Outcome()

    def _journal_line(self, line: str) -> None:
        self._trained = True
        self._on_journal_line(line)

    async def _run_once(self, child: _Child) -> int:
        process = await asyncio.create_subprocess_exec(
            child.service.python,
            "-m",
            *child.service.argv,
            stdin=asyncio.subprocess.PIPE,  # never written; its end tells the child that the supervisor is gone
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C reaches the supervisor alone, which stops things in order
            limit=1 << 24,
        )
        child.process = process
        assert process.stdout is not None and process.stderr is not None
        on_line = self._journal_line if child is self._learner else None
        with (self._log_directory / f"{child.service.name}.log").open("a", encoding="utf-8") as log_file:

            def on_stderr(line: str) -> None:
                log_file.write(line)
                log_file.flush()
                child.last_line = line.strip() or child.last_line

            await asyncio.gather(
                _read_lines(process.stdout, on_line or on_stderr), _read_lines(process.stderr, on_stderr)
            )
        return await process.wait()


async def _read_lines(stream: asyncio.StreamReader, on_line: Callable[[str], None]) -> None:
    async for line in stream:
        on_line(line.decode("utf-8", "replace"))


def _signal(child: _Child, number: signal.Signals) -> None:
    process = child.process
    if process is not None and process.returncode is None:
        process.send_signal(number)
        if number is signal.SIGKILL and process.stdin is not None:
            process.stdin.close()  # what it started and could not stop hears of its end by this


def _how_it_ended(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
