"""Brings an announced version here, whole and verified, with as few bytes as possible.

    held weights ──> the same digest?        nothing is transferred
                 ──> a chain of deltas?      deltas ── each checked ──> applied to a copy ── every digest ──> staged
                 ──> else, or when that fails: tensors ── each checked as it comes ───────────────────────> staged

Each transfer takes the first transport that reaches the learner; one that gives trouble is passed over. What is staged
is held as the base of the next delta. A delta that is malformed or leads to other bytes than announced costs a whole
snapshot, never a wrong weight.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass

from inference_server.weights.transports import Announcement, Part, WeightTransport, batches
from leeway.errors import CorruptDataError, DeadlineError, InvalidDataError, NotFoundError, UnavailableError
from leeway.service.metrics import InferenceServerMetrics
from leeway.types import WeightDelta, WeightRequest, WeightSnapshot
from leeway.weights.deltas import apply_deltas
from leeway.weights.digests import verify_weights, weights_digest

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A part as it was announced."""

    name: str
    size_bytes: int
    digest: bytes


class WeightFetcher:
    """Fetches announced versions.

    Args:
        transports: the ways to the learner, best first; the last one reaches every learner.
        take_deltas: whether to hold the newest weights and take what changed.
        metrics: shows bytes, stages and fallbacks.
    """

    def __init__(
        self, transports: Sequence[WeightTransport], *, take_deltas: bool, metrics: InferenceServerMetrics
    ) -> None:
        self._transports = transports
        self._take_deltas = take_deltas
        self._metrics = metrics
        self._held: WeightSnapshot | None = None

    def close(self) -> None:
        """Release the transports."""
        for transport in self._transports:
            transport.close()

    async def fetch(self, announcement: Announcement) -> WeightSnapshot:
        """The verified bytes of a version.

        Raises:
            NotFoundError: it is no longer the newest; a newer announcement comes.
            CorruptDataError, InvalidDataError: the bytes are not what was announced.
            UnavailableError, DeadlineError: the learner cannot be reached.
        """
        if weights_digest(announcement.manifest) != announcement.version.digest:
            raise CorruptDataError("the weight manifest does not have the announced digest")
        buffers = await self._from_held(announcement)
        if buffers is None:
            buffers = await self._snapshot(announcement)
        snapshot = WeightSnapshot(announcement.version, announcement.publisher_epoch, announcement.manifest, buffers)
        if self._take_deltas:
            self._held = snapshot
        return snapshot

    async def _from_held(self, announcement: Announcement) -> Sequence[Part] | None:
        """The buffers by way of what is held; None when a snapshot is needed."""
        held = self._held
        if held is None:
            return None
        deltas = announcement.deltas_from(held.version.digest)
        same = held.version.digest == announcement.version.digest
        if not deltas and not same:
            log.info("no deltas lead from %s to %s; fetching the snapshot", held.version, announcement.version)
            return None
        try:
            if same:
                await asyncio.to_thread(verify_weights, announcement.manifest, held.buffers, held.version.digest)
                return held.buffers
            return await self._deltas(held, deltas, announcement)
        except (CorruptDataError, InvalidDataError, NotFoundError) as error:
            log.warning("deltas to %s fail (%s); fetching the snapshot", announcement.version, error.message)
            self._metrics.weight_fallbacks.labels("delta").inc()
            return None

    async def _deltas(
        self, held: WeightSnapshot, deltas: Sequence[WeightDelta], announcement: Announcement
    ) -> Sequence[Part]:
        request = WeightRequest(announcement.version, base_digest=held.version.digest)
        wanted = [_Wanted(f"delta {index}", delta.size_bytes, delta.digest) for index, delta in enumerate(deltas)]
        payloads = await self._transfer(announcement, request, wanted)
        began = time.monotonic()
        buffers = await asyncio.to_thread(
            apply_deltas, held, payloads, announcement.manifest, announcement.version.digest
        )
        self._metrics.weight_stage_seconds.labels("stage").observe(time.monotonic() - began)
        return buffers

    async def _snapshot(self, announcement: Announcement) -> Sequence[Part]:
        wanted = [
            _Wanted(f"tensor {entry.name}", entry.size_bytes, entry.digest) for entry in announcement.manifest.tensors
        ]
        return await self._transfer(announcement, WeightRequest(announcement.version), wanted)

    async def _transfer(
        self, announcement: Announcement, request: WeightRequest, wanted: Sequence[_Wanted]
    ) -> list[Part]:
        """The verified parts, by the first way that brings them."""
        began = time.monotonic()
        ways = [transport for transport in self._transports if transport.reaches(announcement)]
        for transport in ways:
            try:
                parts = await self._collect(transport, announcement, request, wanted)
            except (CorruptDataError, InvalidDataError, UnavailableError, DeadlineError) as error:
                transport.gave_trouble(announcement)
                if transport is ways[-1]:
                    raise
                log.warning("weights over %s fail (%s); trying the next way", transport.name, error.message)
                self._metrics.weight_fallbacks.labels(transport.name).inc()
                continue
            kind = "delta" if request.base_digest else "snapshot"
            self._metrics.received_weight_bytes.labels(transport.name, kind).inc(sum(map(len, parts)))
            self._metrics.weight_stage_seconds.labels("transfer").observe(time.monotonic() - began)
            return parts
        raise UnavailableError(f"no way leads to the learner of {announcement.version}; check network.weights")

    @staticmethod
    async def _collect(
        transport: WeightTransport, announcement: Announcement, request: WeightRequest, wanted: Sequence[_Wanted]
    ) -> list[Part]:
        """All parts over one transport; each batch is checked in a thread while the next ones come."""
        parts: list[Part] = []
        checks: list[asyncio.Task[str]] = []
        try:
            async with aclosing(transport.fetch(announcement, request, [part.size_bytes for part in wanted])) as source:
                async for batch in source:
                    expected = wanted[len(parts) : len(parts) + len(batch)]
                    parts += batch
                    for first, end in batches([len(part) for part in batch]):
                        check = asyncio.to_thread(_fault, expected[first:end], batch[first:end])
                        checks.append(asyncio.create_task(check))
            faults = [fault for fault in await asyncio.gather(*checks) if fault]
        finally:
            for check in checks:
                check.cancel()
        if len(parts) != len(wanted):
            raise InvalidDataError(f"{len(parts)} parts came where {len(wanted)} were announced")
        if faults:
            raise CorruptDataError(f"the bytes of {faults[0]} differ from their digest")
        return parts


def _fault(expected: Sequence[_Wanted], parts: Sequence[Part]) -> str:
    """Name of the first part that is not what was announced; empty when all are."""
    for part, data in zip(expected, parts, strict=False):
        if len(data) != part.size_bytes or hashlib.sha256(data).digest() != part.digest:
            return part.name
    return ""
