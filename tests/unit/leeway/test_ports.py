"""A port that is given out is free for a service, and for nobody else who asks."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from leeway.errors import UnavailableError
from leeway.service import ports

HOST = "127.0.0.1"


def is_free(port: int) -> bool:
    try:
        with socket.socket() as probe:
            probe.bind((HOST, port))
    except OSError:
        return False
    return True


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> int:
    """The one port there is to choose."""
    first = ports.free_port(HOST) + 1
    port = next(port for port in range(first, first + 100) if is_free(port))
    monkeypatch.setattr(ports, "_FIRST", port)
    monkeypatch.setattr(ports, "_END", port + 1)
    return port


def test_a_port_is_given_to_one_caller_and_a_service_may_listen_there(only: int) -> None:
    assert ports.free_port(HOST) == only
    with pytest.raises(UnavailableError, match="no free port"):
        ports.free_port(HOST)
    for _ in range(2):  # a service that restarts
        with socket.create_server((HOST, only)) as service, socket.create_connection((HOST, only)):
            service.accept()[0].close()
    with pytest.raises(UnavailableError):
        ports.free_port(HOST)


@pytest.mark.processes
def test_other_processes_are_given_others(only: int) -> None:
    assert ports.free_port(HOST) == only
    program = (
        f"from leeway.service import ports; ports._FIRST, ports._END = {only}, {only + 1}; ports.free_port({HOST!r})"
    )
    asked = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert "UnavailableError: 127.0.0.1: no free port" in asked.stderr


def test_a_port_that_is_listened_on_is_not_given(only: int) -> None:
    with socket.create_server((HOST, only)), pytest.raises(UnavailableError):
        ports.free_port(HOST)
