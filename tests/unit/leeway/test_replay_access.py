"""A command knows a busy replay buffer from none."""

from __future__ import annotations

import socket

import pytest

from leeway.errors import DeadlineError, UnavailableError
from leeway.rpc import Security, check_health
from leeway.service.ports import free_port
from tests.deadlines import WAIT_SECONDS


async def test_where_nobody_listens_is_known_at_once_and_a_busy_server_is_waited_for() -> None:
    with pytest.raises(UnavailableError):
        await check_health(f"127.0.0.1:{free_port('127.0.0.1')}", Security(), 10 * WAIT_SECONDS, patient=False)
    with socket.create_server(("127.0.0.1", 0)) as busy, pytest.raises(DeadlineError):
        await check_health(f"127.0.0.1:{busy.getsockname()[1]}", Security(), 0.5, patient=False)
