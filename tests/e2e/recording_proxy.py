"""A gRPC proxy between the replay buffer and everybody else, which keeps the oracle's record of what was said.

    learner, workers ──> proxy, in the test's process ──> replay buffer
                              │ every request as it comes, every reply before it goes on
                              ▼
                            Record

One event loop stamps everything with one counter, so "this reply had been handed out before that call began" can be
told. The proxy knows methods only as streams of bytes. While the buffer is down new calls wait for it, as they would
without a proxy, and calls in flight end with its UNAVAILABLE.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import grpc
from google.protobuf.message import Message

from leeway.rpc import MAX_MESSAGE_BYTES
from leeway.v1 import replay_pb2

_SERVICE = replay_pb2.DESCRIPTOR.services_by_name["ReplayService"]
_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 200),
]


@dataclass(eq=False)
class Call:
    """One call that is not a stream of writes."""

    method: str
    request: Any
    begun: int
    replies: list[Any] = field(default_factory=list)
    ended: int | None = None  # stamped before the caller learns the outcome
    code: grpc.StatusCode | None = None  # None: nobody knows what became of it

    @property
    def succeeded(self) -> bool:
        return self.code is grpc.StatusCode.OK

    @property
    def reply(self) -> Any:
        return self.replies[0]


@dataclass(eq=False)
class Write:
    """One item of a stream of writes."""

    item: replay_pb2.WriteItem
    server_id: str
    sent: int
    result: replay_pb2.WriteResult | None = None  # None: nobody knows what became of it
    answered: int | None = None

    @property
    def acknowledged(self) -> bool:
        return self.result is not None and self.result.status == replay_pb2.WRITE_STATUS_ACKNOWLEDGED


class Record:
    """Everything that passed, in order."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.writes: list[Write] = []
        self.listeners: list[Callable[[str, Call | Write], None]] = []
        """Told of each event, before it goes on: "Commit.begun", "Commit.ended", "write.sent", "write.answered", ..."""
        self._counter = itertools.count()

    def stamp(self) -> int:
        return next(self._counter)

    def tell(self, event: str, subject: Call | Write) -> None:
        for listener in self.listeners:
            listener(event, subject)

    def of(self, method: str, *, succeeded: bool = True) -> list[Call]:
        """Calls of a method, by the order in which they ended; with `succeeded` only those that did."""
        calls = [call for call in self.calls if call.method == method and (call.succeeded or not succeeded)]
        return sorted(calls, key=lambda call: -1 if call.ended is None else call.ended)


@asynccontextmanager
async def recording_proxy(target: str, record: Record) -> AsyncGenerator[str]:
    """Forward to `target`; yields the proxy's address."""
    server = grpc.aio.server(options=_OPTIONS)
    async with grpc.aio.insecure_channel(target, options=_OPTIONS) as channel:
        server.add_generic_rpc_handlers((_Handler(channel, record),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            await server.stop(0.0)


class _Handler(grpc.GenericRpcHandler):
    def __init__(self, channel: grpc.aio.Channel, record: Record) -> None:
        self._channel = channel
        self._record = record

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        path = handler_call_details.method

        async def forward(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
            observer = _observer(path, self._record)
            upstream: Any = self._channel.stream_stream(path)(
                _observed(requests, observer.on_request), timeout=context.time_remaining(), wait_for_ready=True
            )
            try:
                async for reply in upstream:
                    observer.on_reply(reply)
                    yield reply
            except grpc.aio.AioRpcError as error:
                metadata = tuple(error.trailing_metadata() or ())
                # A stream that breaks while it is written to is INTERNAL for gRPC; the services explain theirs.
                broken = error.code() is grpc.StatusCode.INTERNAL and not metadata
                code = grpc.StatusCode.UNAVAILABLE if broken else error.code()
                observer.on_end(code)
                await context.abort(code, error.details() or "", metadata)
            else:
                observer.on_end(await upstream.code())
            finally:
                upstream.cancel()

        return grpc.stream_stream_rpc_method_handler(forward)


async def _observed(requests: AsyncIterator[bytes], on_request: Callable[[bytes], None]) -> AsyncIterator[bytes]:
    async for request in requests:
        on_request(request)
        yield request


class _Silent:
    """Observes nothing: health checks and the like."""

    def on_request(self, data: bytes) -> None: ...

    def on_reply(self, data: bytes) -> None: ...

    def on_end(self, code: grpc.StatusCode) -> None: ...


class _CallObserver(_Silent):
    def __init__(self, method: str, record: Record) -> None:
        self._method = method
        self._record = record
        self._call: Call | None = None

    def on_request(self, data: bytes) -> None:
        self._call = Call(self._method, _parse(self._method, "input_type", data), self._record.stamp())
        self._record.calls.append(self._call)
        self._record.tell(f"{self._method}.begun", self._call)

    def on_reply(self, data: bytes) -> None:
        assert self._call is not None
        reply = _parse(self._method, "output_type", data)
        self._call.replies.append(reply)
        if not _SERVICE.methods_by_name[self._method].server_streaming:
            # The caller may act on it before the status comes.
            self._end(grpc.StatusCode.OK)

    def on_end(self, code: grpc.StatusCode) -> None:
        if self._call is not None and self._call.ended is None:
            self._end(code)

    def _end(self, code: grpc.StatusCode) -> None:
        assert self._call is not None
        self._call.ended, self._call.code = self._record.stamp(), code
        if self._call.succeeded:
            self._record.tell(f"{self._method}.ended", self._call)


class _WriteObserver(_Silent):
    def __init__(self, record: Record) -> None:
        self._record = record
        self._unanswered: deque[Write] = deque()

    def on_request(self, data: bytes) -> None:
        request = replay_pb2.WriteTrajectoriesRequest.FromString(data)
        for item in request.items:
            write = Write(item, request.server_id, self._record.stamp())
            self._record.writes.append(write)
            self._unanswered.append(write)
            self._record.tell("write.sent", write)

    def on_reply(self, data: bytes) -> None:
        for result in replay_pb2.WriteTrajectoriesResponse.FromString(data).results:
            write = self._unanswered.popleft()
            write.result, write.answered = result, self._record.stamp()
            self._record.tell("write.answered", write)


def _observer(path: str, record: Record) -> _Silent:
    service, _, method = path.strip("/").partition("/")
    if service != _SERVICE.full_name:
        return _Silent()
    return _WriteObserver(record) if method == "WriteTrajectories" else _CallObserver(method, record)


def _parse(method: str, direction: str, data: bytes) -> Message:
    message_type = getattr(_SERVICE.methods_by_name[method], direction)
    return cast("type[Message]", getattr(replay_pb2, message_type.name)).FromString(data)
