"""One ordered stream of writes from a server to the replay buffer that survives restarts of the buffer.

    write ──> window ──> batches (flush_seconds, or full) ──> stream ──> in flight ──> results, in the same order
      ▲                                                                      │
      └── waits while the window is full (backpressure)      acknowledged: forgotten, the window opens
                                                             refused: forgotten and reported to the worker
                                                             exhausted, out of range: sent again, in order

When the stream breaks, everything in flight is put back before the unsent items, and a new stream starts with it. The
buffer recognizes items that it has already. A buffer without room says when to retry, and the writer complies: however
long the disk is full, no item is given up. Only `drain` waits for acknowledgements.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

import grpc

from inference_server.rollout.write_window import MAX_ITEM_BYTES, WriteWindow, size_bytes_of
from leeway import codec
from leeway.config import WriterOptions
from leeway.errors import ExhaustedError, InvalidDataError, LeewayError, UnavailableError
from leeway.replay_client import ReplayClient
from leeway.rpc import Backoff, cancel_and_wait, cancellation_kept, from_rpc_error
from leeway.types import WriteItem, WriteResult
from leeway.v1 import replay_pb2

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


class TrajectoryWriter:
    """Writes items in order and repeats each until it is answered; see the module's docstring.

    Args:
        client: the replay buffer.
        server_id: this server.
        options: limits of window and batches, and deadlines.
        on_refused: called with the answer to each item that the buffer will never accept.
    """

    def __init__(
        self, client: ReplayClient, server_id: str, options: WriterOptions, on_refused: Callable[[WriteResult], None]
    ) -> None:
        self._client = client
        self._server_id = server_id
        self._options = options
        self._window = WriteWindow(options, on_refused)
        self._answered = asyncio.Event()  # something left the window, or the writer gave up
        self._send_not_before = 0.0
        self._waiting_since = 0.0  # last answer, or first item after the window was empty
        self._stall: asyncio.Timeout | None = None
        self._error: LeewayError | None = None

    @property
    def num_unacknowledged(self) -> int:
        """Items without a final answer."""
        return len(self._window)

    async def write(self, items: Sequence[WriteItem]) -> None:
        """Queue items, in order; waits while the window is full.

        Raises:
            InvalidDataError: an item is larger than a message may be; none is queued.
            UnavailableError: the writer has given up on the buffer.
        """
        largest = max(map(size_bytes_of, items))
        if largest > MAX_ITEM_BYTES:
            raise InvalidDataError(
                f"a chunk of {largest} bytes exceeds the message limit of {MAX_ITEM_BYTES}; "
                "lower chunk_tokens of the engine (inference_server.ENGINE.chunk_tokens), or record less per token"
            )
        while self._error is None and self._window.is_full:
            self._answered.clear()
            await self._answered.wait()
        if self._error is not None:
            raise self._error
        was_empty = not self._window
        self._window.add(items)
        if was_empty:
            self._expect_answer()

    async def drain(self) -> None:
        """Wait until every item is answered. It has no deadline of its own."""
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
        backoff = Backoff()
        try:
            while True:
                await self._window.sendable.wait()
                waiting_since = self._waiting_since
                try:
                    problem = await self._stream_until_broken()
                except ExhaustedError as error:
                    self._window.take_back()
                    self._waiting_since = loop.time()  # that was an answer
                    await asyncio.sleep(self._told_to_wait(error.retry_seconds))
                    continue
                self._window.take_back()
                if self._waiting_since > waiting_since:
                    backoff.reset()
                elif loop.time() - self._waiting_since > self._options.patience_seconds:
                    raise UnavailableError(
                        f"the replay buffer at {self._client.address} answered no write for "
                        f"{self._options.patience_seconds:g} s ({problem}); is it running?"
                    )
                log.warning("the stream to the replay buffer at %s broke: %s", self._client.address, problem)
                await backoff.pause()
        except LeewayError as error:
            self._error = error
            self._answered.set()
            raise

    # One stream

    async def _stream_until_broken(self) -> str:
        """Send and receive until the stream ends; returns the reason.

        Raises:
            ExhaustedError: the buffer has no room; it may say when to retry.
            LeewayError: the buffer refuses the stream itself.
        """
        call = self._client.stub.WriteTrajectories()
        sender = asyncio.create_task(self._send(call), name="trajectory writer")
        try:
            with cancellation_kept():
                async with asyncio.timeout(self._options.answer_timeout_seconds) as self._stall:
                    await self._receive(call)
            return "the buffer closed it"
        except TimeoutError:
            return f"no answer within {self._options.answer_timeout_seconds:g} s"
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

    async def _receive(self, call: _Call) -> None:
        while isinstance(reply := await call.read(), replay_pb2.WriteTrajectoriesResponse):
            for message in reply.results:
                self._window.take_answer(codec.result_from_proto(message))
            if (retry_seconds := self._window.send_again_when_complete()) is not None:
                self._send_not_before = asyncio.get_running_loop().time() + self._told_to_wait(retry_seconds)
            self._answered.set()
            self._expect_answer()

    async def _send(self, call: _Call) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._window.sendable.wait()
            if self._send_not_before > loop.time():
                await asyncio.sleep(self._send_not_before - loop.time())
            with suppress(TimeoutError):
                async with asyncio.timeout(self._options.flush_seconds):
                    await self._window.batch_full.wait()
            if not self._window.sendable.is_set():
                continue
            request = replay_pb2.WriteTrajectoriesRequest(run=self._client.run, server_id=self._server_id)
            request.items.extend(codec.item_to_proto(item) for item in self._window.take_batch())
            try:
                await call.write(request)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                return  # the reader meets the same end and reports the reason

    def _told_to_wait(self, retry_seconds: float | None) -> float:
        """The wait before the next write to a buffer without room."""
        wait_seconds = retry_seconds or self._options.exhausted_wait_seconds
        log.warning("the replay buffer at %s has no room; writing again in %g s", self._client.address, wait_seconds)
        return wait_seconds

    def _expect_answer(self) -> None:
        """Restart the deadline for the next answer, or stop it when no item waits for one."""
        now = asyncio.get_running_loop().time()
        self._waiting_since = now
        if self._stall is not None and not self._stall.expired():
            due = max(now, self._send_not_before) + self._options.answer_timeout_seconds
            self._stall.reschedule(due if self.num_unacknowledged else None)


_Call = grpc.aio.StreamStreamCall[replay_pb2.WriteTrajectoriesRequest, replay_pb2.WriteTrajectoriesResponse]
