"""The processes of a run and what is to happen when: one selector, no thread.

turn ── waits for ──> a deadline ──> its act
                      an end of a process ──> reaped, then told
                      a line from somebody else ──> read by whoever listens
"""

from __future__ import annotations

import heapq
import itertools
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable

from tests.chaos.fleet import Child, Program


class Stage:
    """Starts processes, kills them, and tells of those that end by themselves.

    Args:
        on_end: takes a process that ended by itself, and its exit code.
    """

    def __init__(self, on_end: Callable[[Child, int], None]) -> None:
        self.children: dict[str, Child] = {}  # that live, by name
        self._on_end = on_end
        self._lifeline = os.pipe()
        self._selector = selectors.DefaultSelector()
        self._deadlines: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def listen(self, speaker: socket.socket, read: Callable[[], None]) -> None:
        """Call `read` whenever there is something to read."""
        self._selector.register(speaker, selectors.EVENT_READ, read)

    def at(self, seconds: float, act: Callable[[], None]) -> None:
        """Do something so many seconds from now."""
        heapq.heappush(self._deadlines, (time.monotonic() + seconds, next(self._order), act))

    def forget_deadlines(self) -> None:
        self._deadlines.clear()

    def start(self, program: Program) -> None:
        """Unless it lives."""
        if program.name not in self.children:
            child = Child(program, self._lifeline)
            self.children[program.name] = child
            self._selector.register(child, selectors.EVENT_READ)

    def kill(self, name: str) -> bool:
        """Kill a process and wait for its end; false when it does not live."""
        child = self.children.get(name)
        if child is None:
            return False
        child.signal(signal.SIGKILL)
        self._gone(child)
        return True

    def turn(self) -> None:
        """What is due; or else wait for what happens next, a deadline included."""
        now = time.monotonic()
        if self._deadlines and self._deadlines[0][0] <= now:
            heapq.heappop(self._deadlines)[2]()
            return
        wait_seconds = self._deadlines[0][0] - now if self._deadlines else 1.0
        for key, _ in self._selector.select(max(wait_seconds, 0.0)):
            child = key.fileobj
            if not isinstance(child, Child):
                key.data()
            elif self.children.get(child.program.name) is child:  # unless it was killed in this very turn
                self._on_end(child, self._gone(child))

    def _gone(self, child: Child) -> int:
        self._selector.unregister(child)
        del self.children[child.program.name]
        return child.wait()

    def close(self) -> None:
        """Leave no process behind."""
        for name in list(self.children):
            self.kill(name)
        self._selector.close()
        for descriptor in self._lifeline:
            os.close(descriptor)
