"""Processes of one run: started, watched, started again when they die, stopped in order.

    replay buffer, learner, servers: each kept alive by its own task ── exits ──> restart with backoff, or the end
    learner's stdout ──> on_journal_line          all other output ──> logs/NAME.log

    the end    learner exits 0           the run is finished (or it was stopped): servers, then the buffer are stopped
               `stop` is set             the buffer is stopped last, so that checkpoint and rollouts reach it;
                                         `kill` ends everything at once
               a process exits 2         a restart would meet the same error: everything stops with its last line
               too many restarts         likewise

A buffer that exits 0 by itself is started again like one that died; so is a server, unless it says that the run has
finished. Services wait for each other by themselves, so they start together.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from leeway.rpc import Backoff, cancel_and_wait
from leeway.service.children import Child, start
from leeway.service.process import EXIT_OK, EXIT_REFUSED, RUN_FINISHED

OTHERS_STOP_SECONDS: Final = 2.0
_FIRST_PAUSE_SECONDS: Final = 0.25
_LONGEST_PAUSE_SECONDS: Final = 8.0
_RESTART_WINDOW_SECONDS: Final = 120.0
_MAX_RESTARTS: Final = 10
"""Restarts of one service within the window before the supervisor gives up."""


@dataclass(frozen=True, slots=True)
class Service:
    """One process of the run, and the command that starts it."""

    name: str
    command: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the run ended; `error` is empty when it ended well."""

    error: str = ""
    refused: bool = False


@dataclass(slots=True)
class _Supervised:
    """A service and its current process."""

    service: Service
    child: Child | None = None
    last_line: str = ""
    restarts: deque[float] = field(default_factory=deque[float])
    stopping: bool = False
    finished: bool = False

    @property
    def running(self) -> Child | None:
        return self.child if self.child is not None and self.child.exit_code is None else None


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
        self._buffer = _Supervised(replay_buffer)
        self._learner = _Supervised(learner)
        self._servers = [_Supervised(service) for service in servers]
        self._learner_stop_seconds = learner_stop_seconds
        self._log_directory = log_directory
        self._on_journal_line = on_journal_line
        self._on_event = on_event
        self._trained = False  # whether the learner has anything to save

    @property
    def _all(self) -> list[_Supervised]:
        return [self._buffer, self._learner, *self._servers]

    def process_id(self, name: str) -> int | None:
        """The running process of a service; None while it has none."""
        running = next(supervised for supervised in self._all if supervised.service.name == name).running
        return None if running is None else running.process_id

    def kill(self) -> None:
        """End every process at once; `run` then returns."""
        for supervised in self._all:
            supervised.stopping = True
            if supervised.running is not None:
                supervised.running.kill()

    async def run(self, stop: asyncio.Event) -> Outcome:
        """Run until the learner is done, a process cannot go on, or `stop` is set."""
        self._log_directory.mkdir(parents=True, exist_ok=True)
        keepers = {supervised.service.name: asyncio.create_task(self._keep(supervised)) for supervised in self._all}
        learner_task = keepers[self._learner.service.name]
        stopping = asyncio.create_task(stop.wait())
        outcome = Outcome()
        pending: set[asyncio.Task[Any]] = {*keepers.values(), stopping}
        while not (outcome.error or stopping.done() or learner_task.done()):
            _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            ended = [keeper.result() for keeper in keepers.values() if keeper.done()]
            outcome = next((result for result in ended if result.error), outcome)
        outcome = await self._stop_all(learner_task, outcome)
        for task in [*keepers.values(), stopping]:
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

    async def _stop(self, stopped: Sequence[_Supervised], grace_seconds: float) -> None:
        for supervised in stopped:
            supervised.stopping = True
        await asyncio.gather(*(self._stop_one(supervised, grace_seconds) for supervised in stopped))
        await asyncio.sleep(0)  # let the keepers see the exits

    async def _stop_one(self, supervised: _Supervised, grace_seconds: float) -> None:
        if supervised.running is not None and not await supervised.running.stop(grace_seconds) and self._trained:
            self._on_event(f"{supervised.service.name} did not stop within {grace_seconds:g} s and was killed")

    async def _keep(self, supervised: _Supervised) -> Outcome:
        """Start a service and start it again, until it ends by itself or cannot go on."""
        name = supervised.service.name
        while True:
            code = await self._run_once(supervised)
            if supervised.stopping or (code == EXIT_OK and (supervised is self._learner or supervised.finished)):
                return Outcome()
            if code == EXIT_REFUSED:
                return Outcome(supervised.last_line or f"{name} refused to start", refused=True)
            now = time.monotonic()
            supervised.restarts.append(now)
            while supervised.restarts[0] < now - _RESTART_WINDOW_SECONDS:
                supervised.restarts.popleft()
            if len(supervised.restarts) > _MAX_RESTARTS:
                return Outcome(
                    f"{name} ended {len(supervised.restarts)} times within {_RESTART_WINDOW_SECONDS:.0f} s; "
                    f"its last line: {supervised.last_line or 'none'}"
                )
            backoff = Backoff(_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS, num_failures=len(supervised.restarts) - 1)
            pause_seconds = backoff.next_seconds()
            self._on_event(f"{name} {_how_it_ended(code)}; starting it again in {pause_seconds:g} s")
            await asyncio.sleep(pause_seconds)
            if supervised.stopping:
                return Outcome()

    async def _run_once(self, supervised: _Supervised) -> int:
        with (self._log_directory / f"{supervised.service.name}.log").open("a", encoding="utf-8") as log_file:

            def on_line(line: str) -> None:
                log_file.write(line + "\n")
                log_file.flush()
                supervised.last_line = line.strip() or supervised.last_line

            def on_server_line(line: str) -> None:
                supervised.finished = supervised.finished or line == RUN_FINISHED
                on_line(line)

            on_stdout = self._journal_line if supervised is self._learner else on_server_line
            supervised.child = child = await start(supervised.service.command, on_stdout=on_stdout, on_stderr=on_line)
            try:
                return await child.wait()
            finally:
                await child.stop(0.0)  # nothing is left to do, unless this task was cancelled

    def _journal_line(self, line: str) -> None:
        self._trained = True
        self._on_journal_line(line)


def _how_it_ended(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"exited with code {code}" + (" before the run had ended" if code == EXIT_OK else "")
