"""Keeps an engine at the learner's newest version, for as long as the server lives.

    WatchPolicy stream ── announcements ──> newest one ──> fetch, stage, verify ──> ServedPolicy.update ──> engine:
           ▲                                               (WeightFetcher)                    │    pause, copy, resume
           └──────────────── acknowledgement, or refusal with its reason <────────────────────┘

Two tasks: one watches, and opens the stream again when the learner restarts; one applies. An announcement that comes
while another is applied waits; of several only the newest remains. What is being fetched is finished, so that a learner
that publishes faster than this server fetches cannot starve it; but not when the stream breaks: then its learner is
gone, and the next one announces again. Within one incarnation of the learner steps only rise: an announcement of an
earlier step comes too late and is passed over, one that comes twice is acknowledged twice.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Final

import grpc

from inference_server.served_policy import ServedPolicy
from inference_server.weights.fetcher import WeightFetcher
from inference_server.weights.transports import Announcement, WeightSource, WeightTransport
from leeway import codec
from leeway.errors import (
    CorruptDataError,
    DeadlineError,
    FencedError,
    InvalidDataError,
    LeewayError,
    NotFoundError,
    UnavailableError,
)
from leeway.rpc import Backoff, Security, cancel_and_wait, cancellation_kept, from_rpc_error, open_channel
from leeway.service.metrics import InferenceServerMetrics
from leeway.types import ModelSignature, PolicyVersion, WeightSnapshot
from leeway.v1 import policy_pb2, policy_pb2_grpc
from leeway.weights.transports import TRANSPORTS, load_side

_ANNOUNCE_AGAIN_SECONDS: Final = 2.0
_FATAL_CODES: Final = {
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
}

_Call = grpc.aio.StreamStreamCall[policy_pb2.WatchPolicyRequest, policy_pb2.WatchPolicyResponse]

log = logging.getLogger(__name__)


class WeightReceiver:
    """Watches one learner; see the module's docstring.

    Args:
        policy: takes the weights.
        signature: what the engine serves.
        run: name of the run.
        server_id: this server's name in the run.
        address: the learner's PolicyService.
        security: the run's certificates.
        transports: names of the ways that weights may come, the preferred one first and the last one gRPC.
        take_deltas: whether to hold the newest weights on the host and fetch only what changed.
        fetch_timeout_seconds: longest fetch of one version.
        metrics: shows pushes and pauses.
    """

    def __init__(
        self,
        *,
        policy: ServedPolicy,
        signature: ModelSignature,
        run: str,
        server_id: str,
        address: str,
        security: Security,
        transports: Sequence[str] = ("grpc",),
        take_deltas: bool = True,
        fetch_timeout_seconds: float,
        metrics: InferenceServerMetrics,
    ) -> None:
        self._policy = policy
        self._address = address
        self._metrics = metrics
        self._channel = open_channel(address, security)
        self._stub: policy_pb2_grpc.PolicyServiceAsyncStub = policy_pb2_grpc.PolicyServiceStub(self._channel)
        self._hello = policy_pb2.PolicyWatcher(
            run=run, server_id=server_id, signature=codec.signature_to_proto(signature)
        )
        source = WeightSource(self._stub, address, server_id, fetch_timeout_seconds)
        ways: list[WeightTransport] = [load_side(TRANSPORTS[name].transport)(source) for name in transports]
        for way in ways:
            way.greet(self._hello)
        self._fetcher = WeightFetcher(ways, take_deltas=take_deltas, metrics=metrics)
        self._call: _Call | None = None
        self._answering = asyncio.Lock()
        self._newest: tuple[Announcement, float] | None = None  # with the time it came
        self._announced = asyncio.Event()
        self._fetching: asyncio.Task[WeightSnapshot] | None = None

    async def run(self) -> None:
        """Watch and apply until cancelled.

        Raises:
            PreconditionError: run, model or tokenizer differ from the learner's.
        """
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._watch_forever(), name="weight watcher")
                group.create_task(self._apply_forever(), name="weight applier")
        finally:
            await asyncio.to_thread(self._fetcher.close)
            await self._channel.close()

    # Watching

    async def _watch_forever(self) -> None:
        backoff = Backoff()
        while True:
            before = self._newest
            problem = await self._watch_until_broken()
            if self._newest is not before:
                backoff.reset()
            log.info("the policy stream from %s ended (%s); opening it again", self._address, problem)
            await backoff.pause()

    async def _watch_until_broken(self) -> str:
        """Take announcements until the stream ends; say why it did.

        Raises:
            LeewayError: the learner refuses this server.
        """
        call = self._stub.WatchPolicy()
        try:
            await call.write(policy_pb2.WatchPolicyRequest(hello=self._hello))
            self._call = call
            with cancellation_kept():
                while isinstance(message := await call.read(), policy_pb2.WatchPolicyResponse):
                    await self._take(_announcement_from_proto(message))
            return "the learner closed it"
        except grpc.aio.AioRpcError as error:
            if error.code() in _FATAL_CODES:
                raise from_rpc_error(error, f"WatchPolicy at {self._address}") from error
            return f"{error.code().name}: {error.details()}"
        except InvalidDataError as error:
            return f"malformed announcement: {error.message}"
        finally:
            self._call = None
            call.cancel()
            if self._fetching is not None:
                self._fetching.cancel()

    async def _take(self, announcement: Announcement) -> None:
        newest = self._newest[0] if self._newest is not None else announcement
        if announcement.publisher_epoch < newest.publisher_epoch:
            error = FencedError(
                f"weights of learner epoch {announcement.publisher_epoch} are refused: "
                f"epoch {newest.publisher_epoch} has taken over"
            )
            await self._refuse(announcement.version, error)
        elif announcement.publisher_epoch == newest.publisher_epoch and announcement.version.step < newest.version.step:
            log.info("%s was announced after %s; passed over", announcement.version, newest.version)
        else:
            self._newest = announcement, asyncio.get_running_loop().time()
            self._announced.set()

    async def _answer(self, answer: policy_pb2.WatchPolicyRequest) -> None:
        """Tell the learner; if its stream is gone, the next one begins with an announcement again."""
        try:
            async with self._answering:  # both tasks answer, and a call takes one message at a time
                if self._call is not None:
                    await self._call.write(answer)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, asyncio.CancelledError):
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise asyncio.CancelledError from None
            # Or the other task gave the stream up, which looks as if this one were cancelled.
            log.info("an answer was not sent: the policy stream ended")

    # Applying

    async def _apply_forever(self) -> None:
        while True:
            await self._announced.wait()
            self._announced.clear()
            # Without a stream the announcement is as dead as its learner; the next stream begins with another.
            if self._newest is not None and self._call is not None:
                await self._apply(*self._newest)

    async def _apply(self, announcement: Announcement, announced_at: float) -> None:
        version = announcement.version
        fetched_seconds = paused_seconds = 0.0
        loop = asyncio.get_running_loop()
        try:
            self._policy.raise_fence(announcement.publisher_epoch)
            if version != self._policy.version:
                snapshot = await self._fetch(announcement)
                fetched_seconds = loop.time() - announced_at
                swap_began = loop.time()
                paused_seconds = await self._policy.update(snapshot)
                self._metrics.weight_stage_seconds.labels("swap").observe(loop.time() - swap_began)
                self._metrics.weight_pause_seconds.observe(paused_seconds)
        except NotFoundError:
            log.debug("%s was overtaken before it was fetched", version)
            return
        except (UnavailableError, DeadlineError) as error:
            log.warning("%s is not fetched: %s; trying again", version, error.message)
            await self._announce_again()
            return
        except LeewayError as error:
            await self._refuse(version, error)
            if isinstance(error, CorruptDataError | InvalidDataError):  # the next transfer may be whole
                await self._announce_again()
            return
        self._metrics.weight_push_seconds.observe(loop.time() - announced_at)
        log.debug("%s is in force", version)
        await self._answer(
            policy_pb2.WatchPolicyRequest(
                acknowledgement=policy_pb2.PolicyAcknowledgement(
                    version=codec.version_to_proto(version),
                    fetched=codec.duration_to_proto(fetched_seconds),
                    paused=codec.duration_to_proto(paused_seconds),
                )
            )
        )

    async def _fetch(self, announcement: Announcement) -> WeightSnapshot:
        """Fetch, for as long as the learner's stream lasts.

        Raises:
            NotFoundError: another version was announced, or will be: the stream broke.
        """
        self._fetching = asyncio.create_task(self._fetcher.fetch(announcement))
        try:
            await asyncio.wait([self._fetching])
            if self._fetching.cancelled():
                raise NotFoundError(f"the learner that announced {announcement.version} is gone")
            return self._fetching.result()
        finally:
            await cancel_and_wait(self._fetching)
            self._fetching = None

    async def _announce_again(self) -> None:
        """Come back to the newest announcement in a moment, or at once when there is a newer one."""
        try:
            async with asyncio.timeout(_ANNOUNCE_AGAIN_SECONDS):
                await self._announced.wait()
        except TimeoutError:
            self._announced.set()

    async def _refuse(self, version: PolicyVersion, error: LeewayError) -> None:
        log.error("%s is refused: %s", version, error.message)
        message = policy_pb2.PolicyRefusal(version=codec.version_to_proto(version), message=error.message)
        await self._answer(policy_pb2.WatchPolicyRequest(refusal=message))


def _announcement_from_proto(message: policy_pb2.WatchPolicyResponse) -> Announcement:
    """Read an announcement.

    Raises:
        InvalidDataError: it is malformed.
    """
    return Announcement(
        message.publisher_epoch,
        codec.version_from_proto(message.version),
        codec.manifest_from_proto(message.manifest),
        message.local_endpoint,
        tuple(map(codec.delta_from_proto, message.deltas)),
        message.broadcast_port,
    )
