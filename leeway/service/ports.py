"""Free ports for services that were told to pick one."""

from __future__ import annotations

import errno
import socket
from random import SystemRandom
from typing import Final

from leeway.errors import UnavailableError

_FIRST: Final = 20_000
_END: Final = 32_768
"""Beyond lie the ports of outgoing connections: one could take the place of a service that restarts."""
_TRIES: Final = 100


def free_port(host: str) -> int:
    """A port of `host` that nobody listens on, and that no outgoing connection and no other caller is given.

    Between this answer and the service's own bind the port is nobody's. Others who ask meanwhile, in any process, are
    given other ports: a connection that has just ended stays on it (TIME_WAIT, a minute), over which a service may bind
    (SO_REUSEADDR, which gRPC, ZeroMQ, torch and HTTP servers set), and this function does not.

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
    """Leave an ended connection on the port."""
    with (
        socket.create_server((host, port)) as listener,
        socket.create_connection((host, port), timeout=60) as client,
    ):
        accepted, _ = listener.accept()
        accepted.close()  # who ends first keeps the port
        client.recv(1)
