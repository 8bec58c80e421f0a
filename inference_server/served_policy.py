"""The policy version that an engine serves: its replacement, and those who wait for the next one.

weight receiver ──┐
                  ├── update: fence, then one at a time ──> engine.update_weights ──> wakes wait_for_change (the worker)
UpdateWeights ────┘

An update that has begun is finished even if its caller is gone: the engine is never left between two versions.
"""

from __future__ import annotations

import asyncio

from inference_server.engine import Engine
from leeway.errors import FencedError, PreconditionError
from leeway.types import PolicyVersion, WeightSnapshot


class ServedPolicy:
    """Puts verified weights of one run into an engine, and wakes those who wait for a new version."""

    def __init__(self, engine: Engine, run: str) -> None:
        self._engine = engine
        self._run = run
        self._version = engine.info().version
        self._highest_epoch = 0
        self._updating = asyncio.Lock()
        self._changed = asyncio.Event()
        self._swaps: set[asyncio.Task[float]] = set()

    @property
    def version(self) -> PolicyVersion | None:
        """The run's version in force; None before its first."""
        version = self._version
        return version if version is not None and version.run == self._run else None

    def raise_fence(self, publisher_epoch: int) -> None:
        """Refuse weights of older learner incarnations from now on.

        Raises:
            FencedError: this incarnation is itself older than one already seen.
        """
        if publisher_epoch < self._highest_epoch:
            raise FencedError(
                f"weights of learner epoch {publisher_epoch} are refused: epoch {self._highest_epoch} has taken over"
            )
        self._highest_epoch = publisher_epoch

    async def update(self, snapshot: WeightSnapshot) -> float:
        """Put a verified snapshot in force; return the seconds decoding stood still. 0 for the version already served.

        Raises:
            FencedError: the snapshot is of an older learner incarnation.
            PreconditionError: it belongs to another run, or does not fit the model.
        """
        if snapshot.version.run != self._run:
            raise PreconditionError(
                f"weights {snapshot.version} belong to another run; this server serves {self._run!r}"
            )
        self.raise_fence(snapshot.publisher_epoch)
        swap = asyncio.create_task(self._swap(snapshot), name=f"swap to {snapshot.version}")
        self._swaps.add(swap)
        swap.add_done_callback(self._swapped)
        return await asyncio.shield(swap)

    def _swapped(self, swap: asyncio.Task[float]) -> None:
        self._swaps.discard(swap)
        if not swap.cancelled():
            swap.exception()  # retrieved here, because its caller may be gone

    async def _swap(self, snapshot: WeightSnapshot) -> float:
        async with self._updating:
            self.raise_fence(snapshot.publisher_epoch)
            if snapshot.version == self.version:
                return 0.0
            paused_seconds = await self._engine.update_weights(snapshot)
            self._version = snapshot.version
        self._changed.set()
        self._changed = asyncio.Event()
        return paused_seconds

    async def wait_for_change(self, seen: PolicyVersion | None) -> PolicyVersion:
        """Wait until a version other than `seen` is in force."""
        while (version := self.version) is None or version == seen:
            await self._changed.wait()
        return version
