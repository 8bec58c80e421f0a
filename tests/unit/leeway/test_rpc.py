"""A cancellation that grpc.aio takes upon itself still ends whoever was cancelled."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import grpc
import pytest
from prometheus_client import CollectorRegistry

from inference_server.engines.arithmetic import ArithmeticEngine
from inference_server.rollout.trajectory_writer import TrajectoryWriter
from inference_server.served_policy import ServedPolicy
from inference_server.weights.receiver import WeightReceiver
from leeway.config import ArithmeticEngineOptions, WriterOptions
from leeway.errors import ExhaustedError
from leeway.replay_client import ReplayClient
from leeway.rpc import Security, cancel_and_wait, cancellation_kept, mapped_errors
from leeway.service.metrics import InferenceServerMetrics
from leeway.types import WriteItem
from leeway.v1 import policy_pb2


class EndingCall:
    """A stream that ends in the moment in which its reader is cancelled, as grpc.aio's calls may."""

    def __init__(self, error: grpc.aio.AioRpcError | None, reading: asyncio.Event | None = None) -> None:
        self._error = error
        self.reading = reading or asyncio.Event()

    async def read(self) -> object:
        self.reading.set()
        await asyncio.create_task(self._prepare())
        if self._error is not None:
            raise self._error
        return grpc.aio.EOF

    async def _prepare(self) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return  # as grpc.aio does: the reader that waits for this never hears of it

    async def write(self, message: object) -> None: ...

    def cancel(self) -> bool:
        return False


class Stub:
    """Opens such streams."""

    def __init__(self, error: grpc.aio.AioRpcError | None) -> None:
        self._error = error
        self.calls = 0
        self.reading = asyncio.Event()

    def WriteTrajectories(self) -> EndingCall:
        self.calls += 1
        return EndingCall(self._error, self.reading)

    WatchPolicy = WriteTrajectories


def ended(code: grpc.StatusCode) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), "no room")


ENDINGS = [ended(grpc.StatusCode.RESOURCE_EXHAUSTED), ended(grpc.StatusCode.UNAVAILABLE), None]


@pytest.mark.parametrize("error", ENDINGS, ids=["exhausted", "unavailable", "closed"])
async def test_a_cancelled_reader_hears_of_it_and_not_of_the_status(error: grpc.aio.AioRpcError | None) -> None:
    call = EndingCall(error)

    async def read() -> None:
        with mapped_errors("Generate"):
            await call.read()

    reader = asyncio.create_task(read())
    await call.reading.wait()
    await cancel_and_wait(reader)
    assert reader.cancelled()


async def test_a_deadline_inside_is_no_cancellation() -> None:
    with pytest.raises(ExhaustedError), mapped_errors("Generate"):
        async with asyncio.timeout(0.01):
            await EndingCall(ended(grpc.StatusCode.RESOURCE_EXHAUSTED)).read()
    with cancellation_kept():
        async with asyncio.timeout(0.01):
            await EndingCall(None).read()


async def test_a_cleanup_after_a_cancellation_may_call_again() -> None:
    async def clean_up() -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            with cancellation_kept():
                return "told the peer"
        return ""

    task = asyncio.create_task(clean_up())
    await asyncio.sleep(0)
    await cancel_and_wait(task)
    assert task.result() == "told the peer"


@pytest.mark.parametrize("error", ENDINGS, ids=["exhausted", "unavailable", "closed"])
async def test_a_writer_stops_although_its_stream_ends_in_that_moment(error: grpc.aio.AioRpcError | None) -> None:
    stub = Stub(error)
    client = ReplayClient("127.0.0.1:1", "run", Security())

    client.stub = cast("Any", stub)
    options = WriterOptions(flush_seconds=0.0, exhausted_wait_seconds=0.0)
    writer = TrajectoryWriter(client, "server-0", options, lambda _result: None)
    await writer.write([WriteItem("t", 1, 0, b"chunk")])
    task = asyncio.create_task(writer.run())
    await stub.reading.wait()
    await cancel_and_wait(task)
    assert task.cancelled()
    assert stub.calls == 1
    await client.aclose()


def weight_receiver() -> WeightReceiver:
    engine = ArithmeticEngine(ArithmeticEngineOptions())
    return WeightReceiver(
        policy=ServedPolicy(engine, "run"),
        signature=engine.info().signature,
        run="run",
        server_id="server-0",
        address="127.0.0.1:1",
        security=Security(),
        fetch_timeout_seconds=1.0,
        metrics=InferenceServerMetrics(CollectorRegistry()),
    )


@pytest.mark.parametrize("error", ENDINGS[1:], ids=["unavailable", "closed"])
async def test_a_receiver_stops_although_its_stream_ends_in_that_moment(error: grpc.aio.AioRpcError | None) -> None:
    stub, receiver = Stub(error), weight_receiver()
    receiver._stub = cast("Any", stub)
    task = asyncio.create_task(receiver.run())
    await stub.reading.wait()
    await cancel_and_wait(task)
    assert task.cancelled()
    assert stub.calls == 1


async def test_an_answer_on_a_stream_that_is_given_up_ends_nobody_but_who_is_cancelled() -> None:
    class GivenUp:
        """As a call that another task has cancelled."""

        writing = asyncio.Event()
        end = asyncio.Event()

        async def write(self, _message: object) -> None:
            self.writing.set()
            await self.end.wait()
            raise asyncio.CancelledError

    receiver = weight_receiver()
    call = GivenUp()
    receiver._call = cast("Any", call)
    call.end.set()
    await receiver._answer(policy_pb2.WatchPolicyRequest())  # the next stream is answered again

    call.end.clear()
    call.writing.clear()
    task = asyncio.create_task(receiver._answer(policy_pb2.WatchPolicyRequest()))
    await call.writing.wait()
    await cancel_and_wait(task)
    assert task.cancelled()
    receiver._fetcher.close()
    await receiver._channel.close()


async def test_answers_of_both_tasks_go_out_one_after_the_other() -> None:
    class OneAtATime:
        """As gRPC: a second message before the first is sent is an error that ends the call."""

        writing = False
        written = 0

        async def write(self, _message: object) -> None:
            assert not self.writing, "Internal error from Core"
            self.writing = True
            await asyncio.sleep(0)
            self.writing = False
            self.written += 1

    receiver = weight_receiver()
    call = OneAtATime()
    receiver._call = cast("Any", call)
    await asyncio.gather(*(receiver._answer(policy_pb2.WatchPolicyRequest()) for _ in range(3)))
    assert call.written == 3
    receiver._fetcher.close()
    await receiver._channel.close()
