"""Broadcasts of weight bytes from the learner to servers: process groups of torch.distributed, with gloo.

    learner: Rendezvous (a TCPStore) ──> group, rank 0 ── broadcast, piece by piece ──> group, rank 1, 2, ... : servers

A group is made by hand, beside torch's default group: it neither meets nor disturbs those of a learner with several
ranks. Every wait has a deadline: a peer that is silent for `patience_seconds` ends the group for all; one that dies
closes its connections, which the others notice at once. Bytes only, never objects: nothing is pickled. Nothing here is
encrypted or authenticated either; receivers check every digest against what came over the contract's own connection,
before an engine sees a byte.

This is the only module that broadcasts with torch.distributed. `learner.weights.collective` and
`inference_server.weights.collective` import it, and only when the configuration asks for broadcasts.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from datetime import timedelta
from itertools import cycle
from typing import Any, ClassVar, Final

import numpy as np
import torch
import torch.distributed as dist

from leeway.errors import UnavailableError

LIBRARY: Final = "gloo/" + torch.__version__.partition("+")[0]
"""With its version: all peers must have the same."""

_PIECES_IN_FLIGHT: Final = 2
_STORE_SECONDS: Final = 5.0

Part = bytes | memoryview

# Typed in part, or not as exported.
_Work = Any
_dist: Any = dist
_gloo: Any = dist.ProcessGroupGloo


class Rendezvous:
    """The place where groups form: a store on a port of one host address.

    Args:
        host: name or address to listen on.

    Raises:
        UnavailableError: it cannot be listened on.
    """

    def __init__(self, host: str) -> None:
        try:
            listener = socket.create_server((host, 0))
        except OSError as error:
            raise UnavailableError(f"no port of {host} can be listened on for broadcasts: {error.strerror}") from error
        self.address: tuple[str, int] = listener.getsockname()[:2]
        self._store = _dist.TCPStore(
            *self.address,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=_STORE_SECONDS),
            master_listen_fd=listener.detach(),
        )


class BroadcastGroup:
    """The peers of one broadcast after the other. Blocking: lives in threads, one at a time.

    Args:
        address: of the rendezvous.
        number: of the group, the same for all peers.
        rank: place in it; 0 sends.
        size: number of peers, the learner included.
        patience_seconds: longest wait for the others while the group forms, and for each piece afterwards.

    Raises:
        UnavailableError: the rendezvous cannot be reached, or the others did not come.
    """

    piece_bytes: ClassVar[int] = 8 << 20
    """Bytes of one broadcast, the same for all peers: large enough that the fixed cost of each does not count, small
    enough that little is left to check when the last one has come."""

    def __init__(self, address: tuple[str, int], number: int, rank: int, size: int, patience_seconds: float) -> None:
        self.size = size
        self._memory: list[memoryview] = []  # where pieces are put together: used again and again
        self._patience = timedelta(seconds=patience_seconds)
        store = _join_store(address, number, min(patience_seconds, _STORE_SECONDS))
        host = _local_host(address)
        try:
            options = _gloo._Options()
            options._devices = [_gloo.create_device(hostname=host, lazy_init=False)]
            options._timeout = self._patience
            options._threads = 1
            self._group: Any = _gloo(store, rank, size, options)
        except RuntimeError as error:
            raise UnavailableError(f"a group of {size} for a broadcast did not form: {_first_line(error)}") from error

    def send(self, parts: Sequence[Part]) -> Generator[int]:
        """Broadcast parts, piece by piece; yields the bytes of each piece once its broadcast has begun.

        Raises:
            UnavailableError: a peer is gone or silent; the group can no longer be used.
        """
        if not self._memory:
            self._memory = [memoryview(bytearray(self.piece_bytes)) for _ in range(_PIECES_IN_FLIGHT)]
        waiting: deque[_Work] = deque()
        for (start, end), memory in zip(pieces(sum(map(len, parts)), self.piece_bytes), cycle(self._memory)):
            if len(waiting) == _PIECES_IN_FLIGHT:
                _finish(waiting.popleft())
            piece = memory[: end - start]
            gather(parts, start, piece)
            waiting.append(self._begin(piece))
            yield end - start
        for work in waiting:
            _finish(work)

    def receive(self, memory: memoryview) -> Generator[int]:
        """Take parts, piece by piece; yields how many bytes of memory are there, while the next piece comes.

        Raises:
            UnavailableError: the sender or another peer is gone or silent; the group can no longer be used.
        """
        waiting: deque[tuple[_Work, int]] = deque()
        for start, end in pieces(len(memory), self.piece_bytes):
            waiting.append((self._begin(memory[start:end]), end))
            if len(waiting) == _PIECES_IN_FLIGHT:
                work, arrived = waiting.popleft()
                _finish(work)
                yield arrived
        for work, arrived in waiting:
            _finish(work)
            yield arrived

    def close(self) -> None:
        """Leave, which ends the group for the others, too; a piece that is being sent is waited for."""
        self._group = None

    def _begin(self, piece: memoryview) -> _Work:
        group = self._group
        if group is None:
            raise UnavailableError("the group of the broadcast is closed")
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = 0, 0, self._patience
        try:
            return group.broadcast([torch.frombuffer(piece, dtype=torch.uint8)], options)
        except RuntimeError as error:
            raise UnavailableError(f"the broadcast broke: {_first_line(error)}") from error


def pieces(size_bytes: int, piece_bytes: int) -> Iterator[tuple[int, int]]:
    """Byte ranges [start, end) of the parts' concatenation that are broadcast as one, as policy.proto says."""
    return ((start, min(start + piece_bytes, size_bytes)) for start in range(0, size_bytes, piece_bytes))


def gather(parts: Sequence[Part], start: int, memory: memoryview) -> None:
    """Fill memory with the bytes from `start` on of the parts' concatenation."""
    at = filled = 0
    for part in parts:
        skipped = max(start - at, 0)
        taken = min(len(part) - skipped, len(memory) - filled)
        if taken > 0:
            # numpy copies without the GIL.
            source = np.frombuffer(part, np.uint8)[skipped : skipped + taken]
            np.copyto(np.frombuffer(memory, np.uint8)[filled : filled + taken], source)
            filled += taken
        at += len(part)


def _finish(work: _Work) -> None:
    try:
        work.wait()
    except RuntimeError as error:
        raise UnavailableError(f"the broadcast broke: {_first_line(error)}") from error


def _join_store(address: tuple[str, int], number: int, timeout_seconds: float) -> Any:  # noqa: ANN401 (torch's)
    """The part of the rendezvous that belongs to one group."""
    try:
        store = _dist.TCPStore(
            *address, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_seconds)
        )
    except RuntimeError as error:
        raise UnavailableError(
            f"no rendezvous for broadcasts at {address[0]}:{address[1]}: {_first_line(error)}"
        ) from error
    return _dist.PrefixStore(f"{number}", store)


def _local_host(towards: tuple[str, int]) -> str:
    """This host's address on the way to another one."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(towards)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise UnavailableError(f"there is no route to {towards[0]}:{towards[1]}: {error.strerror}") from error


def _first_line(error: BaseException) -> str:
    """The message of a torch error, without the place in its sources and the stack."""
    return str(error).partition("] ")[2].partition(". ")[0].partition("\n")[0] or str(error).partition("\n")[0]
