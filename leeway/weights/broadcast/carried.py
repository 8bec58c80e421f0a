"""Broadcasts by a process of their own, the carrier, which can be killed. Torch-free.

    this process: send ── gather ──> slot ──┐                    ┌── carrier: slot ──> device ── broadcast
                  receive <── copy ── slot ─┴── shared memory ───┴── carrier: slot <── device <── broadcast
                        └── "form", "send", "receive" ──> socket ──> carrier ── "formed", "done", "failed" ──> answers

Each answer has a deadline. A carrier that misses it, fails or dies is killed, its group with it, and another one is
started, so that no state of a library or a driver is trusted after an error; until that is ready this process takes no
part. NCCL needs this: forming a communicator has no deadline, abort may hang, some errors of a device last as long as
the process, and a kernel that waits for a dead peer would stand in the way of whatever else the process computes.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from typing import Final

from leeway.errors import LeewayError, UnavailableError
from leeway.weights.broadcast.carrier import SLOTS, Carrier
from leeway.weights.broadcast.library import Part
from leeway.weights.broadcast.pieces import copy, gather, pieces

_START_SECONDS: Final = 120.0
_GRACE_SECONDS: Final = 5.0
"""Beyond a carrier's own deadline, which says more of what happened."""
_END_SECONDS: Final = 5.0

log = logging.getLogger(__name__)


class Carried:
    """Implements `leeway.weights.broadcast.library.Library`.

    Args:
        program: what to run as the carrier; it is given `--control`, `--memory` and `--piece-bytes`.
        piece_bytes: of one broadcast, and of a slot.
        environment: what the carrier gets beside this process's own.
    """

    def __init__(self, program: Sequence[str], piece_bytes: int, environment: Mapping[str, str] | None = None) -> None:
        self.piece_bytes = piece_bytes
        self.name = ""
        self._program = program
        self._environment = environment or {}
        self._carrier: Carrier | None = None
        self._ended: list[Carrier] = []
        self._closed = False
        self._lock = threading.Lock()

    @property
    def usable(self) -> bool:
        carrier = self._carrier
        if carrier is None or carrier.is_ready():
            return carrier is not None
        if carrier.was_ready:
            self.replace(carrier)  # it died while nobody asked
        return False

    def prepare(self) -> None:
        with self._lock:
            carrier = self._carrier = self._carrier or self._start()
        try:
            self.name = carrier.wait_until_ready(_START_SECONDS)
        except LeewayError:
            carrier.kill()
            raise

    def join(
        self, address: tuple[str, int], number: int, rank: int, size: int, patience_seconds: float
    ) -> CarriedGroup:
        carrier = self._carrier
        if carrier is None or not carrier.is_ready():
            raise UnavailableError("the process that carries broadcasts is not ready")
        group = CarriedGroup(self, carrier, size, patience_seconds)
        try:
            carrier.say(f"form {address[0]} {address[1]} {number} {rank} {size} {patience_seconds}")
            group.expect("formed")
        except BaseException:
            group.close()
            raise
        return group

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._carrier is not None:
                self._carrier.kill()
                self._ended.append(self._carrier)
                self._carrier = None
            for carrier in self._ended:
                carrier.wait_for_end(_END_SECONDS)

    def replace(self, carrier: Carrier) -> None:
        """Another carrier instead of this one, unless there is one already."""
        with self._lock:
            if self._closed or self._carrier is not carrier:
                return
            carrier.kill()
            self._ended = [ended for ended in (*self._ended, carrier) if not ended.wait_for_end(0.0)]
            self._carrier = None
            try:
                self._carrier = self._start()
            except UnavailableError as error:
                log.error("no broadcasts by this process any more: %s", error.message)

    def _start(self) -> Carrier:
        if self._closed:
            raise UnavailableError("broadcasts have ended in this process")
        try:
            return Carrier(self._program, self.piece_bytes, self._environment)
        except OSError as error:
            raise UnavailableError(f"the process that carries broadcasts cannot be started: {error}") from error


class CarriedGroup:
    """Implements `leeway.weights.broadcast.library.Group`."""

    def __init__(self, library: Carried, carrier: Carrier, size: int, patience_seconds: float) -> None:
        self.size = size
        self._library = library
        self._carrier = carrier
        self._patience_seconds = patience_seconds

    def send(self, parts: Sequence[Part]) -> Generator[int]:
        waiting = 0
        for index, (start, end) in enumerate(pieces(sum(map(len, parts)), self._library.piece_bytes)):
            if waiting == SLOTS:
                self.expect("done")
                waiting -= 1
            slot = index % SLOTS
            gather(parts, start, self._carrier.slots[slot][: end - start])
            self._carrier.say(f"send {slot} {end - start}")
            waiting += 1
            yield end - start
        for _ in range(waiting):
            self.expect("done")

    def receive(self, memory: memoryview) -> Generator[int]:
        waiting: deque[tuple[int, int, int]] = deque()
        for index, (start, end) in enumerate(pieces(len(memory), self._library.piece_bytes)):
            if len(waiting) == SLOTS:
                yield self._arrived(*waiting.popleft(), memory)
            self._carrier.say(f"receive {index % SLOTS} {end - start}")
            waiting.append((index % SLOTS, start, end))
        for slot, start, end in waiting:
            yield self._arrived(slot, start, end, memory)

    def close(self) -> None:
        self._library.replace(self._carrier)

    def expect(self, word: str) -> None:
        """Wait for the carrier's next answer.

        Raises:
            UnavailableError: it is another one, or late.
        """
        answer = self._carrier.answer(self._patience_seconds + _GRACE_SECONDS)
        if answer != word:
            raise UnavailableError(f"the process that carries broadcasts says {answer!r} instead of {word!r}")

    def _arrived(self, slot: int, start: int, end: int, memory: memoryview) -> int:
        self.expect("done")
        copy(self._carrier.slots[slot], 0, memory[start:end])
        return end
