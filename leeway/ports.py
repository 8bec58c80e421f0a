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
    """A port of `host` that nobody listens on at this moment, and that no outgoing connection is given later.

    Raises:
        UnavailableError: none was found.
    """
    random = SystemRandom()
    for _ in range(_TRIES):
        port = random.randrange(_FIRST, _END)
        try:
            with socket.create_server((host, port)):
                return port
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
    raise UnavailableError(f"{host}: no free port found between {_FIRST} and {_END}; name ports in [network]")
