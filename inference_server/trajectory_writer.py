"""One ordered stream of writes from a server to the replay buffer, which survives the buffer's restarts.

    write ──> unsent ──> batches (flush_seconds, or full) ──> stream ──> in flight ──> results, in the same order
      ▲                                                                      │
      └── waits while the window is full (backpressure)      acknowledged: forgotten, the window opens
                                                             refused: forgotten and reported to the worker
                                                             exhausted, out of range: sent again, in order

When the stream breaks, everything in flight goes back before what is unsent and a new stream starts with it; the buffer
recognizes what it has already. A buffer without room says when to come back, and is believed: however long its disk
is full, nothing is given up. Nobody waits for an acknowledgement but `drain`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import grpc

from leeway import codec
from leeway.errors import ExhaustedError, InvalidDataError, LeewayError, UnavailableError
from leeway.replay_client import ReplayClient
from leeway.rpc import MAX_MESSAGE_BYTES, cancel_and_wait, from_rpc_error
from leeway.types import WriteItem, WriteResult, WriteStatus
from leeway.v1 import replay_pb2

_FIRST_BACKOFF_SECONDS: Final = 0.1
_LAST_BACKOFF_SECONDS: Final = 2.0
_OVERHEAD_BYTES: Final = 256
"""What an item takes beside its chunk; counted for closes and failures too."""
MAX_ITEM_BYTES: Final = MAX_MESSAGE_BYTES - (1 << 16)

log = logging.getLogger(__name__)

_RAISED_CODES: Final = {
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
}


@dataclass(frozen=True, slots=True)
class WriterLimits:
    """Bounds of the writer.

    Args:
        max_items: writes without an answer; `write` waits beyond it.
        max_bytes: their bytes.
        batch_bytes: a message is sent as soon as it has this much.
        batch_items: or this many items.
        flush_seconds: or this long after its first item.
        answer_timeout_seconds: without an answer for so long the stream counts as broken.
        patience_seconds: without any answer for so long, over all streams, the writer gives up.
        exhausted_wait_seconds: how long to wait when the buffer has no room and does not say for how long.
    """

    max_items: int = 4096
    max_bytes: int = 64 << 20
    batch_bytes: int = 1 << 20
    batch_items: int = 256
    flush_seconds: float = 0.005
    answer_timeout_seconds: float = 60.0
    patience_seconds: float = 600.0
    exhausted_wait_seconds: float = 2.0


class TrajectoryWriter:
    """Writes items in order, each until it is answered; see the module's docstring.

    Args:
        client: the replay buffer.
        server_id: who writes.
        limits: window, batches, deadlines.
        on_refused: takes the answer to each item that will not be accepted, however often it is sent.
    """

    def __init__(
        self, client: ReplayClient, server_id: str, limits: WriterLimits, on_refused: Callable[[WriteResult], None]
    ) -> None:
        self._client = client
        self._server_id = server_id
        self._limits = limits
        self._on_refused = on_refused
        self._unsent: deque[WriteItem] = deque()
        self._in_flight: deque[WriteItem] = deque()
        self._again: list[tuple[WriteItem, WriteResult]] = []  # answered, but to be sent once more
        self._bytes = 0
        self._unsent_bytes = 0
        self._sendable = asyncio.Event()  # something is unsent, and nothing has to go before it
        self._batch_full = asyncio.Event()
        self._answered = asyncio.Event()  # something left the window, or the writer gave up
        self._send_not_before = 0.0
        self._waiting_since = 0.0  # last answer, or first item after the window was empty
        self._stall: asyncio.Timeout | None = None
        self._error: LeewayError | None = None

    @property
    def num_unacknowledged(self) -> int:
        """Items without a final answer."""
        return len(self._unsent) + len(self._in_flight) + len(self._again)

    async def write(self, items: Sequence[WriteItem]) -> None:
        """Queue items, in order; waits while the window is full.

        Raises:
            InvalidDataError: an item is larger than a message may be; none is queued.
            UnavailableError: the writer has given up on the buffer.
        """
        sizes = [_size_bytes(item) for item in items]
        if max(sizes) > MAX_ITEM_BYTES:
            raise InvalidDataError(
                f"a chunk of {max(sizes)} bytes exceeds the message limit of {MAX_ITEM_BYTES}; "
                "lower chunk_tokens, or record less per token"
            )
        while self._error is None and self._is_full():
            self._answered.clear()
            await self._answered.wait()
        if self._error is not None:
            raise self._error
        was_empty = not self.num_unacknowledged
        self._unsent.extend(items)
        size_bytes = sum(sizes)
        self._bytes += size_bytes
        self._unsent_bytes += size_bytes
        self._show_unsent()
        if was_empty:
            self._expect_answer()

    async def drain(self) -> None:
        """Wait until every item is answered; bound it with a timeout."""
        while self.num_unacknowledged and self._error is None:
            self._answered.clear()
            await self._answered.wait()
        if self._error is not None:
            raise self._error

    async def run(self) -> None:
        """Keep a stream open for as long as this task lives.

        Raises:
            UnavailableError: no answer for `patience_seconds` although items waited for one.
            LeewayError: the buffer refuses the stream itself.
        """
        loop = asyncio.get_running_loop()
        backoff_seconds = _FIRST_BACKOFF_SECONDS
        try:
            while True:
                await self._sendable.wait()
                waiting_since = self._waiting_since
                try:
                    problem = await self._stream_until_broken()
                except ExhaustedError as error:
                    self._take_back()
                    self._waiting_since = loop.time()  # that was an answer
                    await asyncio.sleep(self._told_to_wait(error.retry_seconds))
                    continue
                self._take_back()
                if self._waiting_since > waiting_since:
                    backoff_seconds = _FIRST_BACKOFF_SECONDS
                elif loop.time() - self._waiting_since > self._limits.patience_seconds:
                    raise UnavailableError(
                        f"the replay buffer at {self._client.address} answered no write for "
                        f"{self._limits.patience_seconds:g} s ({problem}); is it running?"
                    )
                log.warning("the stream to the replay buffer at %s broke: %s", self._client.address, problem)
                await asyncio.sleep(backoff_seconds)
                backoff_seconds = min(2 * backoff_seconds, _LAST_BACKOFF_SECONDS)
        except LeewayError as error:
            self._error = error
            self._answered.set()
            raise

    # One stream

    async def _stream_until_broken(self) -> str:
        """Send and receive until the stream ends; say why it did.

        Raises:
            ExhaustedError: the buffer has no room; it may say when to come back.
            LeewayError: the buffer refuses the stream itself.
        """
        call = self._client.stub.WriteTrajectories()
        sender = asyncio.create_task(self._send(call), name="trajectory writer")
        try:
            async with asyncio.timeout(self._limits.answer_timeout_seconds) as self._stall:
                while isinstance(reply := await call.read(), replay_pb2.WriteTrajectoriesResponse):
                    for message in reply.results:
                        self._take_answer(codec.result_from_proto(message))
                    self._send_again_when_complete()
                    self._answered.set()
                    self._expect_answer()
            return "the buffer closed it"
        except TimeoutError:
            return f"no answer within {self._limits.answer_timeout_seconds:g} s"
        except grpc.aio.AioRpcError as error:
            if error.code() in _RAISED_CODES:
                raise from_rpc_error(error, f"WriteTrajectories at {self._client.address}") from error
            return f"{error.code().name}: {error.details()}"
        except InvalidDataError as error:
            return error.message
        finally:
            self._stall = None
            await cancel_and_wait(sender)
            call.cancel()

    async def _send(self, call: _Call) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._sendable.wait()
            if self._send_not_before > loop.time():
                await asyncio.sleep(self._send_not_before - loop.time())
            with suppress(TimeoutError):
                async with asyncio.timeout(self._limits.flush_seconds):
                    await self._batch_full.wait()
            if not self._sendable.is_set():
                continue
            request = replay_pb2.WriteTrajectoriesRequest(run=self._client.run, server_id=self._server_id)
            request.items.extend(codec.item_to_proto(item) for item in self._take_batch())
            try:
                await call.write(request)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                return  # the reader meets the same end, and knows why

    def _take_batch(self) -> list[WriteItem]:
        """The next unsent items, at most one message of them; they are in flight from now on."""
        batch: list[WriteItem] = []
        batch_bytes = 0
        while self._unsent and len(batch) < self._limits.batch_items:
            size_bytes = _size_bytes(self._unsent[0])
            if batch and batch_bytes + size_bytes > self._limits.batch_bytes:
                break
            batch.append(self._unsent.popleft())
            batch_bytes += size_bytes
        self._in_flight.extend(batch)
        self._unsent_bytes -= batch_bytes
        self._show_unsent()
        return batch

    def _take_answer(self, result: WriteResult) -> None:
        """One answer; they come in the order of the items.

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
                self._bytes -= _size_bytes(item)
            case WriteStatus.EXHAUSTED | WriteStatus.OUT_OF_RANGE:
                self._again.append((item, result))
                self._sendable.clear()
            case _:
                self._refuse(item, result)

    def _refuse(self, item: WriteItem, result: WriteResult) -> None:
        self._bytes -= _size_bytes(item)
        self._on_refused(result)

    def _send_again_when_complete(self) -> None:
        """Once nothing is in flight, put back what has to be sent again, in its order and before everything unsent."""
        if not self._again or self._in_flight:
            return
        again, self._again = self._again, []
        coming: set[tuple[str, int, int]] = set()
        items: list[WriteItem] = []
        for item, result in again:
            missing = (item.trajectory_id, item.attempt, result.expected_seq)
            if result.status is WriteStatus.OUT_OF_RANGE and missing not in coming:
                # What the buffer misses was acknowledged or refused before: it cannot be sent again.
                self._refuse(item, result)
                continue
            coming.add((item.trajectory_id, item.attempt, item.seq))
            items.append(item)
        if exhausted := [result.retry_seconds for _, result in again if result.status is WriteStatus.EXHAUSTED]:
            self._send_not_before = asyncio.get_running_loop().time() + self._told_to_wait(max(exhausted))
        self._put_back(items)

    def _told_to_wait(self, retry_seconds: float | None) -> float:
        """How long to leave a buffer alone that has no room."""
        wait_seconds = retry_seconds or self._limits.exhausted_wait_seconds
        log.warning("the replay buffer at %s has no room; writing again in %g s", self._client.address, wait_seconds)
        return wait_seconds

    def _take_back(self) -> None:
        """The stream broke: whatever has no final answer is unsent again, in its order."""
        items = [item for item, _ in self._again]
        items.extend(self._in_flight)
        self._again = []
        self._in_flight.clear()
        self._put_back(items)

    def _put_back(self, items: Sequence[WriteItem]) -> None:
        self._unsent.extendleft(reversed(items))
        self._unsent_bytes += sum(_size_bytes(item) for item in items)
        self._show_unsent()

    # What others wait for

    def _is_full(self) -> bool:
        return self.num_unacknowledged > 0 and (
            self.num_unacknowledged >= self._limits.max_items or self._bytes >= self._limits.max_bytes
        )

    def _show_unsent(self) -> None:
        limits = self._limits
        _set(self._sendable, bool(self._unsent) and not self._again)
        _set(
            self._batch_full,
            len(self._unsent) >= limits.batch_items or self._unsent_bytes >= limits.batch_bytes,
        )

    def _expect_answer(self) -> None:
        """Start the clock of the next answer, or stop it when nothing waits for one."""
        now = asyncio.get_running_loop().time()
        self._waiting_since = now
        if self._stall is not None and not self._stall.expired():
            due = max(now, self._send_not_before) + self._limits.answer_timeout_seconds
            self._stall.reschedule(due if self.num_unacknowledged else None)


_Call = grpc.aio.StreamStreamCall[replay_pb2.WriteTrajectoriesRequest, replay_pb2.WriteTrajectoriesResponse]


def _size_bytes(item: WriteItem) -> int:
    return _OVERHEAD_BYTES + (len(item.content) if isinstance(item.content, bytes) else 0)


def _set(event: asyncio.Event, value: bool) -> None:
    if value:
        event.set()
    else:
        event.clear()
