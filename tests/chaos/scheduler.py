"""The processes of a run and what is to happen when: one selector, no thread.

turn ── waits for ──> a deadline ──> its action
                      the end of a process ──> reaped, then reported
                      a message from a process ──> read by its listener
"""

from __future__ import annotations

import heapq
import itertools
import selectors
import signal
import time
from collections.abc import Callable

from tests.chaos.programs import Program
from tests.harness.processes import Child, Message


class Scheduler:
    """Starts processes, kills them, and reports those that end by themselves.

    Args:
        on_end: takes the name of a process that ended by itself, its exit code and its last line.
        on_message: takes each message of a process.
    """

    def __init__(self, on_end: Callable[[str, int, str], None], on_message: Callable[[Message], None]) -> None:
        self.children: dict[str, Child] = {}  # that live, by name
        self._on_end = on_end
        self._on_message = on_message
        self._selector = selectors.DefaultSelector()
        self._deadlines: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def at(self, seconds: float, act: Callable[[], None]) -> None:
        """Do something so many seconds from now."""
        heapq.heappush(self._deadlines, (time.monotonic() + seconds, next(self._order), act))

    def forget_deadlines(self) -> None:
        """Drop everything that was to happen."""
        self._deadlines.clear()

    def start(self, program: Program) -> None:
        """Start a process, unless it lives."""
        if program.name not in self.children:
            child = Child(program.target, *program.arguments, log=program.log_path)
            self.children[program.name] = child
            self._selector.register(child.sentinel, selectors.EVENT_READ, (program.name, child))
            self._selector.register(child.connection, selectors.EVENT_READ, (program.name, child))

    def kill(self, name: str) -> bool:
        """Kill a process and wait for its end; false when it does not live."""
        child = self.children.get(name)
        if child is None:
            return False
        child.signal(signal.SIGKILL)
        self._gone(name, child)
        return True

    def turn(self) -> None:
        """Do what is due, or else wait for what happens next, a deadline included."""
        now = time.monotonic()
        if self._deadlines and self._deadlines[0][0] <= now:
            heapq.heappop(self._deadlines)[2]()
            return
        wait_seconds = self._deadlines[0][0] - now if self._deadlines else 1.0
        for key, _ in self._selector.select(max(wait_seconds, 0.0)):
            name, child = key.data
            if self.children.get(name) is not child:
                continue  # it was killed in this very turn
            if key.fileobj is child.connection:
                self._read(child)
            else:
                self._read(child)
                code = self._gone(name, child)
                self._on_end(name, code, child.last_line())

    def _read(self, child: Child) -> None:
        try:
            for message in child.received():
                self._on_message(message)
        except EOFError:  # its end is reported by the sentinel
            if child.connection.fileno() in self._selector.get_map():
                self._selector.unregister(child.connection)

    def _gone(self, name: str, child: Child) -> int:
        self._selector.unregister(child.sentinel)
        if child.connection.fileno() in self._selector.get_map():
            self._selector.unregister(child.connection)
        del self.children[name]
        return child.wait()

    def close(self) -> None:
        """Kill every process that is left."""
        for name in list(self.children):
            self.kill(name)
        self._selector.close()
