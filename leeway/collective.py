"""Broadcasts of weight bytes from the learner to servers: process groups of torch.distributed, gloo on host memory.

    learner: Rendezvous (a TCPStore) ──> Group, rank 0 ── broadcast, piece by piece ──> Group, rank 1, 2, ... : servers

A group belongs to nobody's default group, so that it neither meets nor disturbs those of a learner with several ranks.
Every wait has a deadline: a peer that is silent for `patience_seconds` ends the group for all, one that died at once.
Bytes only, never objects: nothing is pickled. Nothing here is encrypted or authenticated either; receivers check every
digest against what came over the contract's own connection.

Only `learner.collective_weights` and `inference_server.collective_weights` import this module, and only when the
configuration asks for broadcasts: it needs torch.
"""

from __future__ import annotations

import socket
from collections.abc import Generator, Iterator, Sequence
from ctypes import c_uint8
from datetime import timedelta
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist

from leeway.errors import UnavailableError

PIECE_BYTES: Final = 8 << 20
ALONE_BYTES: Final = 256 << 10
"""A part of this size has pieces of its own, sent without a copy; smaller ones share."""

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
        ends = list(_ends(parts))
        waiting: list[tuple[_Work, Part]] = []
        for start, end in pieces([len(part) for part in parts]):
            data = _between(parts, ends, start, end)  # kept as long as its bytes are on their way
            waiting.append((self._begin(_tensor_over(data)), data))
            if len(waiting) == _PIECES_ON_THEIR_WAY:
                self._finish(waiting.pop(0)[0])
            yield end - start
        for work, _ in waiting:
            self._finish(work)

    def receive(self, memory: memoryview) -> None:
        """Take one piece into memory of its size.

        Raises:
            UnavailableError: the sender or another member is gone or silent; the group is of no more use.
        """
        self._finish(self._begin(_tensor_over(memory)))

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


def pieces(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Byte ranges [start, end) of the parts' concatenation that travel as one, as policy.proto says."""
    start = at = 0  # [start, at): small parts that wait for company
    for size in sizes:
        if size >= ALONE_BYTES:
            if at > start:
                yield start, at
            for offset in range(0, size, PIECE_BYTES):
                yield at + offset, at + min(offset + PIECE_BYTES, size)
            start = at + size
        at += size
        if at - start >= PIECE_BYTES:
            yield start, at
            start = at
    if at > start:
        yield start, at


def host_memory(size_bytes: int) -> memoryview:
    """Writable bytes, uninitialized."""
    return memoryview(np.empty(size_bytes, np.uint8).data)


def local_host(towards: tuple[str, int]) -> str:
    """This host's address on the way to another one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(towards)  # sends nothing
        return str(probe.getsockname()[0])


def _ends(parts: Sequence[Part]) -> Iterator[int]:
    at = 0
    for part in parts:
        at += len(part)
        yield at


def _between(parts: Sequence[Part], ends: Sequence[int], start: int, end: int) -> Part:
    """Bytes [start, end) of the parts' concatenation; a copy only where several parts are in it."""
    first = int(np.searchsorted(ends, start, side="right"))
    offset = start - (ends[first] - len(parts[first]))
    if end <= ends[first]:
        return memoryview(parts[first])[offset : offset + end - start]
    last = int(np.searchsorted(ends, end, side="left"))
    return b"".join(parts[first : last + 1])  # small parts are never cut


def _tensor_over(data: Part) -> torch.Tensor:
    """The bytes as a tensor; torch warns of memory that is read-only, as all is that is sent: hence by its address."""
    array = np.frombuffer(data, np.uint8)
    return torch.frombuffer((c_uint8 * len(data)).from_address(array.ctypes.data), dtype=torch.uint8)


def _one_line(error: BaseException) -> str:
    return str(error).partition("] ")[2].partition(". ")[0].partition("\n")[0] or str(error).partition("\n")[0]
