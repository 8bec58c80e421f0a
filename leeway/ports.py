"""Free ports for services that were told to pick one."""

from __future__ import annotations

import socket


def free_port(host: str) -> int:
    """A port of `host` that nobody listens on at this moment."""
    with socket.create_server((host, 0)) as probe:
        return probe.getsockname()[1]
