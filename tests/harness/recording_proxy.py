"""A gRPC proxy between one service and everybody else, which keeps the oracle's record of what was said.

    learner, workers ──> proxy ──> replay buffer          servers ──> proxy ──> learner (PolicyService)
                          │ every request as it is delivered, every reply before it goes on
                          ▼
                        Record

One event loop stamps everything with one counter, so "this reply had been handed out before that call began" can be
told. The proxy knows methods only as streams of bytes. While the service is down new calls wait for it, as they would
without a proxy, and calls in flight end with its UNAVAILABLE. `Network` decides what happens to each message.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
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
WRITE = "WriteTrajectories"
_LATE_SECONDS = 5.0
"""Longest wait for the outcome of a message that arrives once more."""


class Fate(Enum):
    """What happens to a message."""

    ARRIVES = auto()
    LOST = auto()  # and with it the connection
    TWICE = auto()


class Network:
    """Decides what happens to messages. This one delivers each once; a method that awaits delays its message."""

    async def request(self, method: str, first: bool) -> Fate:
        """The fate of a request, which may be the `first` of its stream."""
        return Fate.ARRIVES

    async def reply(self, method: str) -> Fate:
        """The fate of a reply, which is in the record already."""
        return Fate.ARRIVES

    def repetitions(self, method: str) -> Sequence[float]:
        """Seconds after which the same request arrives once more, on a connection of its own."""
        return ()


@dataclass(eq=False)
class Call:
    """One call that is not a stream of writes."""

    method: str
    request: Any
    begun: int
    replies: list[Any] = field(default_factory=list)
    ended: int | None = None  # stamped before the caller learns the outcome
    code: grpc.StatusCode | None = None  # None: its outcome is unknown
    repeated: bool = False  # by the network: its caller knows nothing of it

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
    result: replay_pb2.WriteResult | None = None  # None: its outcome is unknown
    answered: int | None = None
    repeated: bool = False  # by the network: its sender knows nothing of it

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
async def recording_proxy(target: str, record: Record, network: Network | None = None) -> AsyncGenerator[str]:
    """Forward to `target`; yields the proxy's address."""
    server = grpc.aio.server(options=_OPTIONS)
    async with grpc.aio.insecure_channel(target, options=_OPTIONS) as channel:
        proxy = _Proxy(channel, record, network or Network())
        server.add_generic_rpc_handlers((proxy,))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            await server.stop(0.0)
            await proxy.aclose()


class _Proxy(grpc.GenericRpcHandler):
    def __init__(self, channel: grpc.aio.Channel, record: Record, network: Network) -> None:
        self._channel = channel
        self._record = record
        self._network = network
        self._late: set[asyncio.Task[None]] = set()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        path = handler_call_details.method

        async def forward(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
            async with aclosing(self._forward(path, requests, context)) as replies:
                async for reply in replies:
                    yield reply

        return grpc.stream_stream_rpc_method_handler(forward)

    async def aclose(self) -> None:
        """Nothing arrives any more."""
        for task in self._late:
            task.cancel()
        if self._late:
            await asyncio.wait(self._late)

    async def _forward(self, path: str, requests: AsyncIterator[bytes], context: Any) -> AsyncGenerator[bytes]:
        observer, method = _observer(path, self._record), path.rpartition("/")[2]
        reset = asyncio.Event()
        upstream: Any = self._channel.stream_stream(path)(
            self._delivered(path, requests, observer, reset), timeout=context.time_remaining(), wait_for_ready=True
        )
        breaking = asyncio.create_task(_cancel_when(reset, upstream))
        try:
            async for reply in upstream:
                passed_on = observer.on_reply(reply)
                fate = await self._network.reply(method)
                if fate is Fate.LOST:
                    reset.set()
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "connection reset")
                if passed_on is not None:
                    yield passed_on
                    if fate is Fate.TWICE:
                        yield passed_on
        except grpc.aio.AioRpcError as error:
            metadata = tuple(error.trailing_metadata() or ())
            # A stream that breaks while it is written to is INTERNAL for gRPC; the services explain theirs.
            broken = reset.is_set() or (error.code() is grpc.StatusCode.INTERNAL and not metadata)
            code = grpc.StatusCode.UNAVAILABLE if broken else error.code()
            observer.on_end(code)
            await context.abort(code, error.details() or "", metadata)
        except asyncio.CancelledError:
            if not reset.is_set():
                raise
            await context.abort(grpc.StatusCode.UNAVAILABLE, "connection reset")
        else:
            observer.on_end(await upstream.code())
        finally:
            breaking.cancel()
            upstream.cancel()

    async def _delivered(
        self, path: str, requests: AsyncIterator[bytes], observer: _Silent, reset: asyncio.Event
    ) -> AsyncIterator[bytes]:
        method, first = path.rpartition("/")[2], True
        async for request in requests:
            fate = await self._network.request(method, first)
            first = False
            if fate is Fate.LOST:
                reset.set()
                return
            for seconds in self._network.repetitions(method):
                late = asyncio.create_task(self._arrive_late(path, request, seconds))
                self._late.add(late)
                late.add_done_callback(self._late.discard)
            observer.on_request(request)
            yield request
            if fate is Fate.TWICE:
                observer.on_request(request, repeated=True)
                yield request

    async def _arrive_late(self, path: str, request: bytes, seconds: float) -> None:
        """The same message once more; its sender learns nothing of it, the record does."""
        observer = _observer(path, self._record)
        await asyncio.sleep(seconds)

        async def requests() -> AsyncIterator[bytes]:
            observer.on_request(request, repeated=True)
            yield request

        call: Any = self._channel.stream_stream(path)(requests(), timeout=_LATE_SECONDS)
        try:
            async for reply in call:
                observer.on_reply(reply)
        except grpc.aio.AioRpcError as error:
            observer.on_end(error.code())
        else:
            observer.on_end(await call.code())


async def _cancel_when(reset: asyncio.Event, upstream: Any) -> None:
    await reset.wait()
    upstream.cancel()


class _Silent:
    """Observes nothing: health checks and the like."""

    def on_request(self, data: bytes, *, repeated: bool = False) -> None: ...

    def on_reply(self, data: bytes) -> bytes | None:
        """What of it goes on to the caller."""
        return data

    def on_end(self, code: grpc.StatusCode) -> None: ...


class _CallObserver(_Silent):
    def __init__(self, method: str, record: Record) -> None:
        self._method = method
        self._record = record
        self._call: Call | None = None

    def on_request(self, data: bytes, *, repeated: bool = False) -> None:
        request = _parse(self._method, "input_type", data)
        self._call = Call(self._method, request, self._record.stamp(), repeated=repeated)
        self._record.calls.append(self._call)
        self._record.tell(f"{self._method}.begun", self._call)

    def on_reply(self, data: bytes) -> bytes | None:
        assert self._call is not None
        reply = _parse(self._method, "output_type", data)
        self._call.replies.append(reply)
        if not _SERVICE.methods_by_name[self._method].server_streaming:
            # The caller may act on it before the status comes.
            self._end(grpc.StatusCode.OK)
        return data

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

    def on_request(self, data: bytes, *, repeated: bool = False) -> None:
        request = replay_pb2.WriteTrajectoriesRequest.FromString(data)
        for item in request.items:
            write = Write(item, request.server_id, self._record.stamp(), repeated=repeated)
            self._record.writes.append(write)
            self._unanswered.append(write)
            self._record.tell("write.sent", write)

    def on_reply(self, data: bytes) -> bytes | None:
        reply = replay_pb2.WriteTrajectoriesResponse.FromString(data)
        asked_for: list[replay_pb2.WriteResult] = []
        for result in reply.results:
            write = self._unanswered.popleft()
            write.result, write.answered = result, self._record.stamp()
            self._record.tell("write.answered", write)
            if not write.repeated:
                asked_for.append(result)
        if len(asked_for) == len(reply.results):
            return data
        return replay_pb2.WriteTrajectoriesResponse(results=asked_for).SerializeToString() if asked_for else None


def _observer(path: str, record: Record) -> _Silent:
    service, _, method = path.strip("/").partition("/")
    if service != _SERVICE.full_name:
        return _Silent()
    return _WriteObserver(record) if method == WRITE else _CallObserver(method, record)


def _parse(method: str, direction: str, data: bytes) -> Message:
    message_type = getattr(_SERVICE.methods_by_name[method], direction)
    return cast("type[Message]", getattr(replay_pb2, message_type.name)).FromString(data)
