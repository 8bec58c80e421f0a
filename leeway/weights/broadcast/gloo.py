"""gloo: within the process, from the sender's host memory to the receivers', without a copy in between at these."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from datetime import timedelta
from itertools import cycle
from typing import Any, Final

import torch
import torch.distributed as dist

from leeway.errors import UnavailableError
from leeway.weights.broadcast.calls import begin, finish, one_line
from leeway.weights.broadcast.library import Part
from leeway.weights.broadcast.pieces import gather, pieces
from leeway.weights.broadcast.rendezvous import Store, local_host, meet

_PIECES_ON_THEIR_WAY: Final = 2

# Typed in part, or not as exported.
_Work = Any
_gloo: Any = dist.ProcessGroupGloo


class Gloo:
    """Implements `leeway.weights.broadcast.library.Library`. A dead peer closes its connections."""

    piece_bytes: int = 8 << 20
    """Enough that what each costs by itself does not count, few enough that little is left to check when the last has
    come."""
    name = "gloo/" + torch.__version__.partition("+")[0]
    usable = True

    def prepare(self) -> None:
        pass

    def join(self, address: tuple[str, int], number: int, rank: int, size: int, patience_seconds: float) -> GlooGroup:
        store = meet(address, number, patience_seconds)
        return GlooGroup(store, rank, size, local_host(address), patience_seconds, self.piece_bytes)

    def close(self) -> None:
        pass


class GlooGroup:
    """Implements `leeway.weights.broadcast.library.Group`.

    Args:
        store: where its members meet.
        rank: place in it; 0 sends.
        size: members.
        host: this member's address, as the others can reach it.
        patience_seconds: longest wait for the others while the group forms, and for each piece afterwards.
        piece_bytes: bytes of one broadcast.

    Raises:
        UnavailableError: the others did not come.
    """

    def __init__(
        self, store: Store, rank: int, size: int, host: str, patience_seconds: float, piece_bytes: int
    ) -> None:
        self.size = size
        self._piece_bytes = piece_bytes
        self._memory: list[memoryview] = []  # where pieces are put together: used again and again
        self._patience = timedelta(seconds=patience_seconds)
        self._group: Any = form_gloo(store, rank, size, host, patience_seconds)

    def send(self, parts: Sequence[Part]) -> Generator[int]:
        if not self._memory:
            self._memory = [memoryview(bytearray(self._piece_bytes)) for _ in range(_PIECES_ON_THEIR_WAY)]
        waiting: deque[tuple[_Work, memoryview]] = deque()
        for (start, end), memory in zip(pieces(sum(map(len, parts)), self._piece_bytes), cycle(self._memory)):
            if len(waiting) == _PIECES_ON_THEIR_WAY:
                finish(waiting.popleft()[0])
            piece = memory[: end - start]
            gather(parts, start, piece)
            waiting.append((self._begin(piece), piece))
            yield end - start
        for work, _ in waiting:
            finish(work)

    def receive(self, memory: memoryview) -> Generator[int]:
        waiting: deque[tuple[_Work, int]] = deque()
        for start, end in pieces(len(memory), self._piece_bytes):
            waiting.append((self._begin(memory[start:end]), end))
            if len(waiting) == _PIECES_ON_THEIR_WAY:
                work, arrived = waiting.popleft()
                finish(work)
                yield arrived
        for work, arrived in waiting:
            finish(work)
            yield arrived

    def close(self) -> None:
        """Close its connections, which the other members notice at once; a piece on its way is waited for."""
        self._group = None

    def _begin(self, piece: memoryview) -> _Work:
        group = self._group
        if group is None:
            raise UnavailableError("the group of the broadcast is closed")
        return begin(group, torch.frombuffer(piece, dtype=torch.uint8), self._patience)


def form_gloo(store: Store, rank: int, size: int, host: str, patience_seconds: float) -> Any:  # noqa: ANN401 (torch's)
    """A process group.

    Raises:
        UnavailableError: the others did not come.
    """
    try:
        options = _gloo._Options()
        options._devices = [_gloo.create_device(hostname=host, lazy_init=False)]
        options._timeout = timedelta(seconds=patience_seconds)
        options._threads = 1
        return _gloo(store, rank, size, options)
    except RuntimeError as error:
        raise UnavailableError(f"a group of {size} for a broadcast did not form: {one_line(error)}") from error
