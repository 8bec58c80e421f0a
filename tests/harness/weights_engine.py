"""An engine that is nothing but its weights: it copies new ones slowly, tensor by tensor, and can be looked at.

`looks_right` hashes the weights that are live at that moment and compares them with the label under which a token would
be sampled. Between pause and resume nothing is sampled, so nothing is looked at.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from inference_server.engine import GenerationEnd, GenerationRequest
from leeway import arithmetic
from leeway.errors import FencedError
from leeway.types import EngineInfo, LogprobMode, PolicyVersion, TrajectoryChunk, WeightManifest, WeightSnapshot
from leeway.weights.digests import tensor_entry, weights_digest


class WeightsEngine:
    """Implements Engine, except that it samples nothing.

    Args:
        on_update: called when an update is in force.
    """

    def __init__(self, on_update: Callable[[], None] = lambda: None) -> None:
        self._on_update = on_update
        self.label: PolicyVersion | None = None
        self.paused = False
        self.updates = 0
        self.publisher_epoch = 0  # of what is served
        self._entries: list[tuple[str, str, tuple[int, ...]]] = []
        self._live: list[bytearray] = []
        self._highest_epoch = 0

    def looks_right(self) -> bool:
        """Whether the live bytes are those that the label names."""
        assert self.label is not None
        entries = [
            tensor_entry(*entry, memoryview(data)) for entry, data in zip(self._entries, self._live, strict=True)
        ]
        return weights_digest(WeightManifest(tuple(entries))) == self.label.digest

    def info(self) -> EngineInfo:
        return EngineInfo(arithmetic.SIGNATURE, "weights/1", LogprobMode.SAMPLED, self.label, 0, False, 1)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TrajectoryChunk | GenerationEnd, None]:
        raise NotImplementedError
        yield

    async def update_weights(self, snapshot: WeightSnapshot) -> float:
        if snapshot.publisher_epoch < self._highest_epoch:
            raise FencedError(f"epoch {self._highest_epoch} has taken over")
        self._highest_epoch = snapshot.publisher_epoch
        self.paused = True
        if not self._live:
            self._live = [bytearray(len(buffer)) for buffer in snapshot.buffers]
        self._entries = [(entry.name, entry.dtype, entry.shape) for entry in snapshot.manifest.tensors]
        for live, buffer in zip(self._live, snapshot.buffers, strict=True):
            live[:] = buffer
            await asyncio.sleep(0)  # a kill, a cancellation, a look may come here
        self.label = snapshot.version
        self.publisher_epoch = snapshot.publisher_epoch
        self.updates += 1
        self.paused = False
        self._on_update()
        return 0.0

    async def pause(self) -> None:
        raise NotImplementedError

    async def resume(self) -> None:
        raise NotImplementedError

    async def aclose(self) -> None:
        pass
