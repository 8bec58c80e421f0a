"""Channels: the settings that every connection shares.

Both ends set the same message limit and keepalive, so a dead peer is noticed within seconds. Calls wait for the
connection and repeat on UNAVAILABLE (every RPC of Leeway may be repeated); a deadline on each call bounds that.
"""

from __future__ import annotations

import ipaddress
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc

from leeway.errors import ConfigError

MAX_MESSAGE_BYTES: Final = 64 << 20
BULK_PIECE_BYTES: Final = 1 << 20
"""Bulk data travels in pieces of this size; HTTP/2 flow control is then real backpressure."""

KEEPALIVE: Final = [
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
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
_CHANNEL_OPTIONS: Final = [*KEEPALIVE, *_RECONNECTION, ("grpc.service_config", _SERVICE_CONFIG)]
_IMPATIENT_CHANNEL_OPTIONS: Final = [*KEEPALIVE, *_RECONNECTION, ("grpc.enable_retries", 0)]


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
    """True if `host:port` can only be reached from this host."""
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
