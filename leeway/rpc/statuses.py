"""Calls that end early: a LeewayError as a status with `google.rpc.ErrorInfo` and back; tasks cancelled in a call."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from leeway import errors
from leeway.errors import DeadlineError, ExhaustedError, LeewayError, UnavailableError

_DOMAIN: Final = "leeway"
_rpc_status: Any = rpc_status  # its types are partial
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


def status_of(error: LeewayError) -> grpc.Status:
    """The status that carries an error."""
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


async def cancel_and_wait(task: asyncio.Task[Any]) -> None:
    """Cancel a task and wait until it has ended; its own outcome is not reported."""
    task.cancel()
    await asyncio.wait([task])
