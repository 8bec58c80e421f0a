"""Servers: health, reflection, and handlers whose LeewayErrors become statuses."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from leeway.errors import ConfigError, LeewayError, UnavailableError
from leeway.rpc.channels import KEEPALIVE, Security, is_loopback, open_channel
from leeway.rpc.statuses import mapped_errors, status_of

_SERVER_OPTIONS: Final = [
    *KEEPALIVE,
    # The default of five minutes answers the clients' keepalive with GOAWAY too_many_pings.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    # Two processes must never share a port unnoticed.
    ("grpc.so_reuseport", 0),
]

# The types of grpc's handlers and of the health service are partial or private.
_Handler = Any
_Context = grpc.aio.ServicerContext[Any, Any]
_health_grpc: Any = health_pb2_grpc


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
            await context.abort_with_status(status_of(error))

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
            await context.abort_with_status(status_of(error))

    return call
