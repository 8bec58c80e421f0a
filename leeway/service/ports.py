"""Free ports for services that were told to pick one."""

from __future__ import annotations

import errno
import socket
from random import SystemRandom
from typing import Final

from leeway.errors import UnavailableError

_FIRST: Final = 20_000
_END: Final = 32_768
"""Below the ephemeral ports, so that an outgoing connection cannot take the port of a service that restarts."""
_TRIES: Final = 100


def free_port(host: str) -> int:
    """Find a port of `host` without a listener, which no outgoing connection and no other caller is given.

    The port has no owner until the service binds it. To keep other callers in any process from choosing it, a
    connection is opened and ended on it. That leaves the port in TIME_WAIT for a minute: this function then does not
    choose it, but servers that set SO_REUSEADDR, as those of gRPC, ZeroMQ, torch and HTTP do, can bind it.

    Raises:
        UnavailableError: none was found.
    """
    random = SystemRandom()
    for _ in range(_TRIES):
        port = random.randrange(_FIRST, _END)
        try:
            with socket.socket() as probe:
                probe.bind((host, port))
            _keep(host, port)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
        else:
            return port
    raise UnavailableError(f"{host}: no free port found between {_FIRST} and {_END}; name ports in [network]")


def _keep(host: str, port: int) -> None:
    """Leave an ended connection on the port, in TIME_WAIT."""
    with (
        socket.create_server((host, port)) as listener,
        socket.create_connection((host, port), timeout=60) as client,
    ):
        accepted, _ = listener.accept()
        accepted.close()  # the side that closes first stays in TIME_WAIT
        client.recv(1)
