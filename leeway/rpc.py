"""Channels and servers: the settings that every connection shares, and errors across the wire.

Server side, a handler raises a LeewayError and the interceptor turns it into a status with `google.rpc.ErrorInfo`;
client side, `mapped_errors` turns the status back. Both ends set the same message limit and keepalive, so a dead peer
is noticed within seconds. Calls wait for the connection and repeat on UNAVAILABLE (every RPC of Leeway may be
repeated); a deadline on each call bounds that.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from leeway import errors
from leeway.errors import ConfigError, DeadlineError, ExhaustedError, LeewayError, UnavailableError

MAX_MESSAGE_BYTES: Final = 64 << 20
BULK_PIECE_BYTES: Final = 1 << 20
"""Bulk data travels in pieces of this size; HTTP/2 flow control is then real backpressure."""

_DOMAIN: Final = "leeway"
_KEEPALIVE: Final = [
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
]
_SERVER_OPTIONS: Final = [
    *_KEEPALIVE,
    # The default of five minutes answers the clients' keepalive with GOAWAY too_many_pings.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    # Two processes must never share a port unnoticed.
    ("grpc.so_reuseport", 0),
]
_SERVICE_CONFIG: Final = json.dumps(
    {
        "methodConfig": [
            {
                "name": [{}],
                "waitForReady": True,
                "retryPolicy": {
                    "maxAttempts": 5,
                    "initialBackoff": "0.1s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }
)
_RECONNECTION: Final = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]
_CHANNEL_OPTIONS: Final = [*_KEEPALIVE, *_RECONNECTION, ("grpc.service_config", _SERVICE_CONFIG)]
_IMPATIENT_CHANNEL_OPTIONS: Final = [*_KEEPALIVE, *_RECONNECTION, ("grpc.enable_retries", 0)]

log = logging.getLogger(__name__)

# The types of grpc's handlers, of the health service and of rich statuses are partial or private.
_Handler = Any
_Context = grpc.aio.ServicerContext[Any, Any]
_health_grpc: Any = health_pb2_grpc
_rpc_status: Any = rpc_status


@dataclass(frozen=True, slots=True)
class Security:
    """Mutual TLS with one certificate per service, or plain text on loopback."""

    certificate: bytes | None = None
    key: bytes | None = None
    authority: bytes | None = None  # the CA that signs every service of the run
    insecure: bool = False

    @property
    def tls(self) -> bool:
        return self.certificate is not None

    @classmethod
    def from_files(
        cls, certificate: Path | None, key: Path | None, authority: Path | None, *, insecure: bool
    ) -> Security:
        """Read PEM files; all three or none.

        Raises:
            ConfigError: some are set and some not, or a file cannot be read.
        """
        paths = {"certificate": certificate, "key": key, "authority": authority}
        if all(path is None for path in paths.values()):
            return cls(insecure=insecure)
        contents: dict[str, bytes] = {}
        for name, path in paths.items():
            if path is None:
                raise ConfigError(f"network.{name}: mutual TLS needs certificate, key and authority; set all three")
            try:
                contents[name] = path.read_bytes()
            except OSError as error:
                raise ConfigError(f"network.{name}: cannot read {path}: {error.strerror}") from error
        return cls(**contents, insecure=insecure)


def open_channel(address: str, security: Security, *, patient: bool = True) -> grpc.aio.Channel:
    """A channel with Leeway's limits, keepalive and retries; connects when first used.

    Args:
        address: host:port.
        security: certificates, if any.
        patient: whether calls wait for the connection and repeat on UNAVAILABLE; otherwise they fail at once.
    """
    options = _CHANNEL_OPTIONS if patient else _IMPATIENT_CHANNEL_OPTIONS
    if not security.tls:
        return grpc.aio.insecure_channel(address, options=options)
    credentials = grpc.ssl_channel_credentials(security.authority, security.key, security.certificate)
    return grpc.aio.secure_channel(address, credentials, options=options)


def is_loopback(address: str) -> bool:
    """Whether `host:port` can only be reached from this host."""
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class RunningServer:
    """A gRPC server with health and reflection."""

    def __init__(self, server: grpc.aio.Server, health: HealthServicer, port: int) -> None:
        self._server = server
        self._health = health
        self.port = port

    async def stop(self, grace_seconds: float = 3.0) -> None:
        """Report NOT_SERVING, let calls in flight finish within the grace, then cut them."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_seconds)


async def start_server(
    address: str,
    add_services: Callable[[grpc.aio.Server], None],
    service_names: Sequence[str],
    security: Security,
) -> RunningServer:
    """Listen on `address` ("host:port"; port 0 picks a free one).

    Raises:
        ConfigError: the port is taken, or the address is beyond loopback without certificates.
    """
    if not (is_loopback(address) or security.tls or security.insecure):
        raise ConfigError(
            f"refusing to listen on {address} without mutual TLS: set network.certificate, key and authority, "
            "or network.insecure = true on a network you trust"
        )
    server = grpc.aio.server(interceptors=[_ErrorInterceptor()], options=_SERVER_OPTIONS)
    health = HealthServicer()
    _health_grpc.add_HealthServicer_to_server(health, server)
    add_services(server)
    reflection.enable_server_reflection(
        [*service_names, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME], server
    )
    try:
        port = _bind(server, address, security)
    except RuntimeError as error:
        raise ConfigError(f"cannot listen on {address}: is the port in use? Choose another in [network]") from error
    await server.start()
    for name in ("", *service_names):
        await health.set(name, health_pb2.HealthCheckResponse.SERVING)
    return RunningServer(server, health, port)


def _bind(server: grpc.aio.Server, address: str, security: Security) -> int:
    if not security.tls:
        return server.add_insecure_port(address)
    assert security.key is not None and security.certificate is not None
    credentials = grpc.ssl_server_credentials(
        [(security.key, security.certificate)], security.authority, require_client_auth=True
    )
    return server.add_secure_port(address, credentials)


async def check_health(address: str, security: Security, timeout_seconds: float, *, patient: bool = True) -> None:
    """Wait until the server at `address` serves; unless `patient`, only for the answer of one that listens already.

    Raises:
        UnavailableError, DeadlineError: it does not.
    """
    async with open_channel(address, security, patient=patient) as channel:
        with mapped_errors(f"health check of {address}"):
            reply = await _health_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=timeout_seconds
            )
    if reply.status != health_pb2.HealthCheckResponse.SERVING:
        raise UnavailableError(f"{address} is not serving")


# Errors across the wire

_BY_REASON: Final = {
    error.reason: error for error in vars(errors).values() if isinstance(error, type) and issubclass(error, LeewayError)
}
_BY_CODE: Final = {error.code: error for error in reversed(list(_BY_REASON.values())) if error is not LeewayError}


@contextmanager
def mapped_errors(what: str) -> Generator[None]:
    """Turn a failed call's status into the LeewayError that caused it; `what` names call and peer."""
    try:
        with cancellation_kept():
            yield
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error, what) from error


@contextmanager
def cancellation_kept() -> Generator[None]:
    """End with CancelledError if the task is cancelled inside, whatever else ends the block.

    A stream's first read waits for a task of grpc.aio's own, which takes the cancellation upon itself; if the call ends
    in the same moment, the reader sees its status only, and a task that calls again would never stop.
    """
    task = asyncio.current_task()
    assert task is not None, "calls are made in tasks"
    num_cancels = task.cancelling()
    try:
        yield
    finally:
        if task.cancelling() > num_cancels:
            raise asyncio.CancelledError


def from_rpc_error(error: grpc.aio.AioRpcError, what: str) -> LeewayError:
    """The LeewayError behind a status."""
    status: status_pb2.Status | None = _rpc_status.from_call(error)
    details: Any = () if status is None else status.details
    retry, info = error_details_pb2.RetryInfo(), error_details_pb2.ErrorInfo()
    unpacked = [message.DESCRIPTOR.name for detail in details for message in (retry, info) if detail.Unpack(message)]
    retry_seconds = retry.retry_delay.ToTimedelta().total_seconds() if "RetryInfo" in unpacked else None
    if "ErrorInfo" in unpacked and info.domain == _DOMAIN and info.reason in _BY_REASON:
        kind = _BY_REASON[info.reason]
        message = error.details() or info.reason
        return ExhaustedError(message, retry_seconds) if kind is ExhaustedError else kind(message)
    kind = _BY_CODE.get(error.code(), UnavailableError if error.code() is grpc.StatusCode.CANCELLED else LeewayError)
    if kind is DeadlineError:
        return DeadlineError(f"{what}: no answer within the deadline; is the peer running?")
    if kind is ExhaustedError:
        return ExhaustedError(f"{what}: {error.code().name}: {error.details()}", retry_seconds)
    return kind(f"{what}: {error.code().name}: {error.details()}")


def _status_of(error: LeewayError) -> grpc.Status:
    details = [error_details_pb2.ErrorInfo(reason=error.reason, domain=_DOMAIN), *_retry_info(error)]
    packed = [any_pb2.Any() for _ in details]
    for target, detail in zip(packed, details, strict=True):
        target.Pack(detail)
    code: int = error.code.value[0]
    return _rpc_status.to_status(status_pb2.Status(code=code, message=error.message, details=packed))


def _retry_info(error: LeewayError) -> list[error_details_pb2.RetryInfo]:
    if not isinstance(error, ExhaustedError) or error.retry_seconds is None:
        return []
    info = error_details_pb2.RetryInfo()
    info.retry_delay.FromTimedelta(timedelta(seconds=error.retry_seconds))
    return [info]


class _ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns LeewayErrors into statuses; health and reflection, which raise none, pass through."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler:
        handler = await continuation(handler_call_details)
        if handler is None or not str(handler_call_details.method).startswith("/leeway."):
            return handler
        codecs = handler.request_deserializer, handler.response_serializer
        if handler.response_streaming and handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(_streaming(handler.stream_stream), *codecs)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(_streaming(handler.unary_stream), *codecs)
        if handler.request_streaming:
            return grpc.stream_unary_rpc_method_handler(_unary(handler.stream_unary), *codecs)
        return grpc.unary_unary_rpc_method_handler(_unary(handler.unary_unary), *codecs)


def _unary(behavior: Callable[[Any, _Context], Awaitable[Any]]) -> Callable[[Any, _Context], Awaitable[object]]:
    async def call(request: object, context: _Context) -> object:
        try:
            return await behavior(request, context)
        except LeewayError as error:
            await context.abort_with_status(_status_of(error))

    return call


def _streaming(
    behavior: Callable[[Any, _Context], AsyncGenerator[Any]],
) -> Callable[[Any, _Context], AsyncIterator[object]]:
    async def call(request: object, context: _Context) -> AsyncIterator[object]:
        try:
            async with aclosing(behavior(request, context)) as responses:  # also when the call is cancelled at a yield
                async for response in responses:
                    yield response
        except LeewayError as error:
            await context.abort_with_status(_status_of(error))

    return call


async def cancel_and_wait(task: asyncio.Task[Any]) -> None:
    """Cancel a task and wait until it has ended; its own outcome is not reported."""
    task.cancel()
    await asyncio.wait([task])
