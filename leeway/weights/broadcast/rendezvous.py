"""Where groups of torch.distributed meet."""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any, Final

import torch.distributed as dist

from leeway.errors import UnavailableError
from leeway.weights.broadcast.calls import one_line

_STORE_SECONDS: Final = 5.0

Store = Any
# Typed in part, or not as exported.
_dist: Any = dist


class Rendezvous:
    """Where groups meet: a store on a port of one host address.

    Args:
        host: name or address to listen on.

    Raises:
        UnavailableError: it cannot be listened on.
    """

    def __init__(self, host: str) -> None:
        try:
            listener = socket.create_server((host, 0))
        except OSError as error:
            raise UnavailableError(f"no port of {host} can be listened on for broadcasts: {error.strerror}") from error
        self.address: tuple[str, int] = listener.getsockname()[:2]
        self._store = _dist.TCPStore(
            *self.address,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=_STORE_SECONDS),
            master_listen_fd=listener.detach(),
        )


def meet(address: tuple[str, int], number: int, patience_seconds: float) -> Store:
    """What the members of one group tell each other there.

    Raises:
        UnavailableError: the rendezvous cannot be reached.
    """
    timeout = timedelta(seconds=min(patience_seconds, _STORE_SECONDS))
    try:
        store = _dist.TCPStore(*address, is_master=False, wait_for_workers=False, timeout=timeout)
    except RuntimeError as error:
        raise UnavailableError(
            f"no rendezvous for broadcasts at {address[0]}:{address[1]}: {one_line(error)}"
        ) from error
    return _dist.PrefixStore(f"{number}", store)


def local_host(towards: tuple[str, int]) -> str:
    """This host's address on the way to another one.

    Raises:
        UnavailableError: there is no way.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(towards)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise UnavailableError(f"no way leads to {towards[0]}:{towards[1]}: {error.strerror}") from error
