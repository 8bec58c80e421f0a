"""Every error that Leeway raises, as one tree.

    LeewayError
    ├── ConfigError             a configuration cannot be used                 INVALID_ARGUMENT
    ├── InvalidDataError        the caller sent something malformed            INVALID_ARGUMENT
    ├── NotFoundError           the named thing does not exist                 NOT_FOUND
    ├── PreconditionError       the state forbids it; retrying does not help   FAILED_PRECONDITION
    ├── FencedError             a newer learner or attempt took over; restart  ABORTED
    │                           one level up, not this call
    ├── ExhaustedError          no room now; retry later                       RESOURCE_EXHAUSTED
    ├── UnavailableError        the peer cannot be reached; retry              UNAVAILABLE
    ├── DeadlineError           no answer or event within the time allowed     DEADLINE_EXCEEDED
    └── CorruptDataError        bytes do not match their digest                DATA_LOSS

A message says what happened, where, and what to do. `leeway.rpc` maps the tree to gRPC status codes and back, with
`reason` as `google.rpc.ErrorInfo.reason`.
"""

from __future__ import annotations

from typing import ClassVar

import grpc


class LeewayError(Exception):
    """Root of the tree."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    reason: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConfigError(LeewayError):
    """A configuration that cannot be used: names file and key."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "CONFIG"


class InvalidDataError(LeewayError):
    """The caller sent something malformed."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "INVALID_DATA"


class NotFoundError(LeewayError):
    """The named thing does not exist."""

    code = grpc.StatusCode.NOT_FOUND
    reason = "NOT_FOUND"


class PreconditionError(LeewayError):
    """Not possible in this state; retrying alone will not help."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "PRECONDITION"


class FencedError(LeewayError):
    """A newer learner or attempt took over; restart one level up. This epoch or attempt is refused from now on."""

    code = grpc.StatusCode.ABORTED
    reason = "FENCED"


class ExhaustedError(LeewayError):
    """No room now; the same call may succeed later."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "EXHAUSTED"

    def __init__(self, message: str, retry_seconds: float | None = None) -> None:
        super().__init__(message)
        self.retry_seconds = retry_seconds
        """When to call again, if the peer said so; sent as `google.rpc.RetryInfo`."""


class UnavailableError(LeewayError):
    """The peer cannot be reached; the same call may succeed later."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "UNAVAILABLE"


class DeadlineError(LeewayError):
    """No answer or event came within the time allowed."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "DEADLINE"


class CorruptDataError(LeewayError):
    """Bytes do not match their digest."""

    code = grpc.StatusCode.DATA_LOSS
    reason = "CORRUPT_DATA"
