"""The kit's client hears a server's answer, however early it comes."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import Any, cast

import grpc
import pytest

from leeway.conformance.client import BackendClient, Refused, Update
from leeway.rpc import Security
from leeway.types import PolicyVersion, WeightManifest


class AnsweredEarly:
    """A call that ends while it is written to."""

    def __init__(self) -> None:
        self._written = 0

    async def write(self, _message: object) -> None:
        self._written += 1
        if self._written > 1:
            raise asyncio.InvalidStateError("RPC already finished.")  # as grpc.aio says it

    def __await__(self) -> Generator[Any, None, Any]:
        yield from asyncio.sleep(0).__await__()
        raise grpc.aio.AioRpcError(grpc.StatusCode.INVALID_ARGUMENT, grpc.aio.Metadata(), grpc.aio.Metadata(), "no")


async def test_an_update_that_is_refused_before_its_end_is_a_refusal() -> None:
    class Stub:
        def UpdateWeights(self, timeout: float) -> AnsweredEarly:
            return AnsweredEarly()

    client = BackendClient("127.0.0.1:1", Security(), 1.0)
    client._stub = cast("Any", Stub())
    update = Update(1, PolicyVersion("run", 1, 1, b""), WeightManifest(()), [b"a piece", b"another"])
    with pytest.raises(Refused, match="INVALID_ARGUMENT"):
        await client.update(update)
    await client.aclose()
