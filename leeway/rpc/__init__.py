"""gRPC as every service of Leeway uses it.

backoff      how long to wait before an attempt is repeated
channels     what a client opens: limits, keepalive, retries, certificates
servers      what a service listens with; a handler raises a LeewayError, the client gets the same one
statuses     how that error travels
cancelling   tasks that end when they are cancelled, whatever their call does in that moment
"""

from leeway.rpc.backoff import Backoff
from leeway.rpc.channels import (
    BULK_PIECE_BYTES,
    MAX_MESSAGE_BYTES,
    Security,
    is_loopback,
    open_channel,
)
from leeway.rpc.servers import RunningServer, check_health, start_server
from leeway.rpc.statuses import cancel_and_wait, cancellation_kept, from_rpc_error, mapped_errors

__all__ = [
    "BULK_PIECE_BYTES",
    "MAX_MESSAGE_BYTES",
    "Backoff",
    "RunningServer",
    "Security",
    "cancel_and_wait",
    "cancellation_kept",
    "check_health",
    "from_rpc_error",
    "is_loopback",
    "mapped_errors",
    "open_channel",
    "start_server",
]
