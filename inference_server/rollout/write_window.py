"""The write window: items that are unsent or without an answer, in one order and bounded.

add ──> unsent ──> take_batch ──> in flight ──> take_answer ──> acknowledged: forgotten
           ▲                                        ├── refused: forgotten and reported
           │                                        └── exhausted, out of range: again
           └── take_back (the stream broke) ────────────── send_again_when_complete
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from leeway.config import WriterOptions
from leeway.errors import InvalidDataError
from leeway.rpc import MAX_MESSAGE_BYTES
from leeway.types import WriteItem, WriteResult, WriteStatus

_OVERHEAD_BYTES: Final = 256
"""Size of an item beside its chunk; closes and failures count with it, too."""
MAX_ITEM_BYTES: Final = MAX_MESSAGE_BYTES - (1 << 16)


class WriteWindow:
    """See the module's docstring.

    Args:
        options: limits of the window and of a batch.
        on_refused: called with the answer to each item that the buffer will never accept.
    """

    def __init__(self, options: WriterOptions, on_refused: Callable[[WriteResult], None]) -> None:
        self._options = options
        self._on_refused = on_refused
        self._unsent: deque[WriteItem] = deque()
        self._in_flight: deque[WriteItem] = deque()
        self._again: list[tuple[WriteItem, WriteResult]] = []  # answered, but to be sent once more
        self._bytes = 0
        self._unsent_bytes = 0
        self.sendable = asyncio.Event()  # something is unsent, and nothing has to go before it
        self.batch_full = asyncio.Event()

    def __len__(self) -> int:
        """Items without a final answer."""
        return len(self._unsent) + len(self._in_flight) + len(self._again)

    def add(self, items: Sequence[WriteItem]) -> None:
        """Queue items, in order."""
        self._unsent.extend(items)
        size_bytes = sum(map(size_bytes_of, items))
        self._bytes += size_bytes
        self._unsent_bytes += size_bytes
        self._show_unsent()

    def take_batch(self) -> list[WriteItem]:
        """The next unsent items, at most one message of them; they are in flight from now on."""
        batch: list[WriteItem] = []
        batch_bytes = 0
        while self._unsent and len(batch) < self._options.batch_items:
            size_bytes = size_bytes_of(self._unsent[0])
            if batch and batch_bytes + size_bytes > self._options.batch_bytes:
                break
            batch.append(self._unsent.popleft())
            batch_bytes += size_bytes
        self._in_flight.extend(batch)
        self._unsent_bytes -= batch_bytes
        self._show_unsent()
        return batch

    def take_answer(self, result: WriteResult) -> None:
        """Take one answer. Answers come in the order of the items.

        Raises:
            InvalidDataError: the answer is not that of the next item.
        """
        item = self._in_flight[0] if self._in_flight else None
        if item is None or (item.trajectory_id, item.attempt, item.seq) != (
            result.trajectory_id,
            result.attempt,
            result.seq,
        ):
            raise InvalidDataError(f"the answer to {result.trajectory_id} seq {result.seq} is out of order")
        self._in_flight.popleft()
        match result.status:
            case WriteStatus.ACKNOWLEDGED:
                self._bytes -= size_bytes_of(item)
            case WriteStatus.EXHAUSTED | WriteStatus.OUT_OF_RANGE:
                self._again.append((item, result))
                self.sendable.clear()
            case _:
                self._refuse(item, result)

    def _refuse(self, item: WriteItem, result: WriteResult) -> None:
        self._bytes -= size_bytes_of(item)
        self._on_refused(result)

    def send_again_when_complete(self) -> float | None:
        """Once nothing is in flight, put items that must be repeated back before everything unsent, in their order.

        Returns:
            The longest wait that the buffer asked for, 0 if it named none; None if it had room for every item.
        """
        if not self._again or self._in_flight:
            return None
        again, self._again = self._again, []
        coming: set[tuple[str, int, int]] = set()
        items: list[WriteItem] = []
        for item, result in again:
            missing = (item.trajectory_id, item.attempt, result.expected_seq)
            if result.status is WriteStatus.OUT_OF_RANGE and missing not in coming:
                # The missing item was acknowledged or refused before, so it cannot be sent again.
                self._refuse(item, result)
                continue
            coming.add((item.trajectory_id, item.attempt, item.seq))
            items.append(item)
        self._put_back(items)
        exhausted = [result.retry_seconds or 0.0 for _, result in again if result.status is WriteStatus.EXHAUSTED]
        return max(exhausted, default=None)

    def take_back(self) -> None:
        """The stream broke: every item without a final answer is unsent again, in its order."""
        items = [item for item, _ in self._again]
        items.extend(self._in_flight)
        self._again = []
        self._in_flight.clear()
        self._put_back(items)

    def _put_back(self, items: Sequence[WriteItem]) -> None:
        self._unsent.extendleft(reversed(items))
        self._unsent_bytes += sum(size_bytes_of(item) for item in items)
        self._show_unsent()

    @property
    def is_full(self) -> bool:
        """True if the next item has to wait."""
        return len(self) > 0 and (len(self) >= self._options.window_items or self._bytes >= self._options.window_bytes)

    def _show_unsent(self) -> None:
        options = self._options
        _set(self.sendable, bool(self._unsent) and not self._again)
        _set(
            self.batch_full,
            len(self._unsent) >= options.batch_items or self._unsent_bytes >= options.batch_bytes,
        )


def size_bytes_of(item: WriteItem) -> int:
    """Size of an item against the window and the batch."""
    return _OVERHEAD_BYTES + (len(item.content) if isinstance(item.content, bytes) else 0)


def _set(event: asyncio.Event, value: bool) -> None:
    if value:
        event.set()
    else:
        event.clear()
