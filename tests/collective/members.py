"""Members of a group within one process, each with a carrier of its own, and their broadcasts in threads."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from leeway.errors import UnavailableError
from leeway.weights.broadcast.library import Group, Library, Part
from leeway.weights.broadcast.rendezvous import Rendezvous

T = TypeVar("T")


def at_once(calls: Sequence[Callable[[], T]]) -> list[T | UnavailableError]:
    """What each returns, or that it failed."""
    with ThreadPoolExecutor(len(calls)) as threads:
        return [_outcome(future) for future in [threads.submit(call) for call in calls]]


def _outcome(future: Future[T]) -> T | UnavailableError:
    try:
        return future.result()
    except UnavailableError as error:
        return error


def prepared(libraries: Sequence[Library]) -> None:
    """Wait until each is ready: after a failure another carrier is on its way."""
    for outcome in at_once([library.prepare for library in libraries]):
        if outcome is not None:
            raise outcome


def formed(libraries: Sequence[Library], patience_seconds: float) -> list[Group | UnavailableError]:
    """A group of all of them; the first is to send."""
    meeting = Rendezvous("127.0.0.1")
    number, size = secrets.randbits(63), len(libraries)
    return at_once(
        [
            lambda rank=rank, library=library: library.join(meeting.address, number, rank, size, patience_seconds)
            for rank, library in enumerate(libraries)
        ]
    )


def broadcast(
    groups: Sequence[Group], parts: Sequence[Part], at_piece: Callable[[int], None] = lambda _index: None
) -> list[bytearray | UnavailableError]:
    """What every receiver has in the end, or that it failed; `at_piece` runs as the sender has begun one.

    Raises:
        UnavailableError: the sender failed, and no receiver.
    """
    size_bytes = sum(map(len, parts))

    def send() -> bytearray:
        sent = 0
        for index, piece_bytes in enumerate(groups[0].send(parts)):
            sent += piece_bytes
            at_piece(index)
        assert sent == size_bytes
        return bytearray()

    def receive(group: Group) -> bytearray:
        memory = bytearray(size_bytes)
        arrived = 0
        for end in group.receive(memoryview(memory)):
            assert end > arrived
            arrived = end
        assert arrived == size_bytes
        return memory

    calls = [send, *(lambda group=group: receive(group) for group in groups[1:])]
    sender, *receivers = at_once([_closing_on_failure(group, call) for group, call in zip(groups, calls, strict=True)])
    if isinstance(sender, UnavailableError) and not any(isinstance(one, UnavailableError) for one in receivers):
        raise sender
    return receivers


def _closing_on_failure(group: Group, call: Callable[[], bytearray]) -> Callable[[], bytearray]:
    def closing() -> bytearray:
        try:
            return call()
        except BaseException:
            group.close()  # as the learner and the servers do
            raise

    return closing
