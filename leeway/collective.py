"""Broadcasts of weight bytes from the learner to servers: process groups of torch.distributed, gloo on host memory.

    learner: Rendezvous (a TCPStore) ──> Group, rank 0 ── broadcast, piece by piece ──> Group, rank 1, 2, ... : servers

A group belongs to nobody's default group, so that it neither meets nor disturbs those of a learner with several ranks.
Every wait has a deadline: a peer that is silent for `patience_seconds` ends the group for all, one that died at once.
Bytes only, never objects: nothing is pickled. Nothing here is encrypted or authenticated either; receivers check every
digest against what came over the contract's own connection.

Only `learner.weights.collective` and `inference_server.weights.collective` import this module, and only when the
configuration asks for broadcasts: it needs torch.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from datetime import timedelta
from itertools import cycle
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist

from leeway.errors import UnavailableError

PIECE_BYTES: Final = 4 << 20
"""Bytes of one broadcast: enough that what each costs by itself does not count, few enough that little is left to check
when the last has come."""

LIBRARY: Final = "gloo/" + torch.__version__.partition("+")[0]
"""Both ends of a group must have the same."""

_PIECES_ON_THEIR_WAY: Final = 2
_STORE_SECONDS: Final = 5.0

Part = bytes | memoryview
Store = Any
# Typed in part, or not as exported.
_Work = Any
_dist: Any = dist
_gloo: Any = dist.ProcessGroupGloo


class Rendezvous:
    """Where groups meet: a store on a port of one host address.

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
        self.host: str = listener.getsockname()[0]
        self.port: int = listener.getsockname()[1]
        self.store = _dist.TCPStore(
            self.host,
            self.port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=_STORE_SECONDS),
            master_listen_fd=listener.detach(),
        )


class Group:
    """A process group. Blocking: lives in threads.

    Args:
        store: where its members meet.
        number: of the group, the same for all members.
        rank: place in it; 0 sends.
        size: members.
        host: this member's address, as the others can reach it.
        patience_seconds: longest wait for the others while the group forms, and for each piece afterwards.

    Raises:
        UnavailableError: the others did not come.
    """

    def __init__(self, store: Store, number: int, rank: int, size: int, host: str, patience_seconds: float) -> None:
        self.size = size
        self._pieces: list[memoryview] = []
        self._patience = timedelta(seconds=patience_seconds)
        try:
            options = _gloo._Options()
            options._devices = [_gloo.create_device(hostname=host, lazy_init=False)]
            options._timeout = self._patience
            options._threads = 1
            self._group = _gloo(_dist.PrefixStore(f"{number}", store), rank, size, options)
        except RuntimeError as error:
            raise UnavailableError(f"a group of {size} for a broadcast did not form: {_one_line(error)}") from error

    @classmethod
    def join(cls, address: tuple[str, int], number: int, rank: int, size: int, patience_seconds: float) -> Group:
        """Become a member that receives; `address` is the rendezvous.

        Raises:
            UnavailableError: the rendezvous or the others cannot be reached.
        """
        timeout = timedelta(seconds=min(patience_seconds, _STORE_SECONDS))
        try:
            own = local_host(address)
            store = _dist.TCPStore(*address, is_master=False, wait_for_workers=False, timeout=timeout)
        except (RuntimeError, OSError) as error:
            raise UnavailableError(f"no rendezvous for broadcasts at {address[0]}:{address[1]}: {error}") from error
        return cls(store, number, rank, size, own, patience_seconds)

    def send(self, parts: Sequence[Part]) -> Generator[int]:
        """Broadcast parts, piece by piece; yields the bytes of each when it has left.

        Raises:
            UnavailableError: a member is gone or silent; the group is of no more use.
        """
        waiting: deque[tuple[_Work, memoryview]] = deque()
        for (start, end), memory in zip(pieces(sum(map(len, parts))), cycle(self._memory())):
            if len(waiting) == _PIECES_ON_THEIR_WAY:
                self._finish(waiting.popleft()[0])
            piece = memory[: end - start]
            _gather(parts, start, piece)
            waiting.append((self._begin(_tensor_over(piece)), piece))
            yield end - start
        for work, _ in waiting:
            self._finish(work)

    def receive(self, memory: memoryview) -> Generator[int]:
        """Take parts, piece by piece; yields how many bytes of memory are there, while the next piece comes.

        Raises:
            UnavailableError: the sender or another member is gone or silent; the group is of no more use.
        """
        waiting: deque[tuple[_Work, int]] = deque()
        for start, end in pieces(len(memory)):
            waiting.append((self._begin(_tensor_over(memory[start:end])), end))
            if len(waiting) == _PIECES_ON_THEIR_WAY:
                work, arrived = waiting.popleft()
                self._finish(work)
                yield arrived
        for work, arrived in waiting:
            self._finish(work)
            yield arrived

    def _memory(self) -> list[memoryview]:
        """Where pieces are put together: used again and again."""
        if not self._pieces:
            self._pieces = [memoryview(bytearray(PIECE_BYTES)) for _ in range(_PIECES_ON_THEIR_WAY)]
        return self._pieces

    def close(self) -> None:
        """Close its connections, which the other members notice at once; a piece on its way is waited for."""
        self._group = None

    def _begin(self, tensor: torch.Tensor) -> _Work:
        options = dist.BroadcastOptions()
        if self._group is None:
            raise UnavailableError("the group of the broadcast is closed")
        options.rootRank, options.rootTensor, options.timeout = 0, 0, self._patience
        try:
            return self._group.broadcast([tensor], options)
        except RuntimeError as error:
            raise UnavailableError(f"the broadcast broke: {_one_line(error)}") from error

    @staticmethod
    def _finish(work: _Work) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise UnavailableError(f"the broadcast broke: {_one_line(error)}") from error


def pieces(size_bytes: int) -> Iterator[tuple[int, int]]:
    """Byte ranges [start, end) of the parts' concatenation that travel as one, as policy.proto says."""
    return ((start, min(start + PIECE_BYTES, size_bytes)) for start in range(0, size_bytes, PIECE_BYTES))


def local_host(towards: tuple[str, int]) -> str:
    """This host's address on the way to another one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(towards)  # sends nothing
        return str(probe.getsockname()[0])


def _gather(parts: Sequence[Part], start: int, memory: memoryview) -> None:
    """Fill memory with the bytes from `start` on of the parts' concatenation."""
    at = filled = 0
    for part in parts:
        skipped = max(start - at, 0)
        taken = min(len(part) - skipped, len(memory) - filled)
        if taken > 0:
            source = np.frombuffer(part, np.uint8)[skipped : skipped + taken]
            np.copyto(np.frombuffer(memory, np.uint8)[filled : filled + taken], source)  # without the GIL
            filled += taken
        at += len(part)


def _tensor_over(data: memoryview) -> torch.Tensor:
    """The bytes as a tensor."""
    return torch.frombuffer(data, dtype=torch.uint8)


def _one_line(error: BaseException) -> str:
    return str(error).partition("] ")[2].partition(". ")[0].partition("\n")[0] or str(error).partition("\n")[0]
