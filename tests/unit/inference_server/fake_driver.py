"""An engine in processes of its own, played by the test: it takes a step when told to, and commands outlive callers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

import numpy as np
from prometheus_client.registry import Collector

from inference_server.engine import GenerationRequest
from inference_server.engines.process.concurrency import ConcurrencyLimit
from inference_server.engines.process.driver import Labelled, SampledEnd
from inference_server.engines.process.engine import ProcessEngine
from inference_server.engines.process.staged_weights import FILE_NAME
from leeway.config import ProcessEngineOptions
from leeway.errors import PreconditionError
from leeway.types import (
    Column,
    ColumnKind,
    EngineInfo,
    FinishReason,
    LogprobMode,
    ModelSignature,
    PolicyVersion,
    TrajectoryChunk,
    WeightManifest,
    WeightSnapshot,
)
from leeway.weights.digests import tensor_entry, weights_digest
from tests.deadlines import WAIT_SECONDS

SIGNATURE = ModelSignature(b"model", b"tokenizer", 32, 0, 0, 0, 48)


class DeathError(Exception):
    """The engine has died."""


class FakeDriver:
    """An engine that samples one token per open request in each `step`, unless it stands still."""

    name = "Fake"
    failures = (DeathError,)

    def __init__(self, limit: ConcurrencyLimit) -> None:
        self._limit = limit
        self.running = True
        self.killable = True
        self.dead = asyncio.Event()
        self.label = 0
        self.loaded: list[float] = []
        self.log: list[str] = []
        self.broken: set[str] = set()  # commands that fail
        self.held: dict[str, asyncio.Event] = {}  # commands that take until the event
        self.reached = asyncio.Condition()
        self.queues: dict[str, asyncio.Queue[int | DeathError]] = {}
        self.salts: dict[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def step(self) -> None:
        if self.running and not self.dead.is_set():
            for queue in self.queues.values():
                queue.put_nowait(self.label)

    async def at(self, command: str) -> None:
        """Wait until a command has been reached."""
        async with asyncio.timeout(WAIT_SECONDS), self.reached:
            await self.reached.wait_for(lambda: command in self.log)

    async def sample(
        self, request: GenerationRequest, request_id: str, label: int, max_tokens: int
    ) -> AsyncGenerator[TrajectoryChunk | SampledEnd, None]:
        queue = self.queues[request_id] = asyncio.Queue()
        self.salts[request_id] = label
        labels: list[int] = []
        start = len(request.prompt_token_ids)
        try:
            while len(labels) < max_tokens:
                sampled = await queue.get()
                if isinstance(sampled, DeathError):
                    raise sampled
                position = start + len(labels)
                labels.append(sampled)
                column = Column(ColumnKind.TOKEN_IDS, position, position + 1, np.array([sampled], np.int32))
                if len(labels) < max_tokens:
                    yield TrajectoryChunk(columns=(column,))
                else:
                    spans = [Labelled(index, index + 1, each) for index, each in enumerate(labels)]
                    yield SampledEnd(FinishReason.LENGTH, len(labels), (column,), spans)
        finally:
            del self.queues[request_id]

    async def pause(self, *, recompute: bool) -> None:
        if recompute:
            self._limit.forgive()
        await self._command("pause")

    async def load(self, folder: Path, label: int) -> None:
        await self._command("load")
        self.loaded.append(weights_in(folder))
        self.label = label

    async def resume(self) -> None:
        await self._command("resume")

    async def ended(self) -> str:
        await self.dead.wait()
        return "it is gone"

    def kill(self) -> None:
        self.log.append("kill")
        if self.killable:
            self._die()

    async def aclose(self, request_ids: Sequence[str]) -> None:
        self.log.append(f"close {len(request_ids)}")
        self._die()

    def collectors(self) -> Sequence[Collector]:
        return ()

    def _die(self) -> None:
        self.dead.set()
        for queue in self.queues.values():
            queue.put_nowait(DeathError("gone"))

    async def _command(self, name: str) -> None:
        """What has been sent is done, whether or not somebody still waits for the answer."""
        task = asyncio.create_task(self._do(name))
        self._tasks.add(task)
        await asyncio.shield(task)

    async def _do(self, name: str) -> None:
        async with self.reached:
            self.log.append(name)
            self.reached.notify_all()
        if name in self.held:
            await self.held[name].wait()
        if name in self.broken or self.dead.is_set():
            raise DeathError(f"{name} is broken")
        if name != "load":
            self.running = name == "resume"


def weights_in(folder: Path) -> float:
    """The one weight that is staged in a folder."""
    return float(np.frombuffer((folder / FILE_NAME).read_bytes()[-4:], np.float32)[0])


def snapshot(step: int, *, epoch: int = 1, name: str = "weight") -> WeightSnapshot:
    data = np.full(4, step, np.float32).tobytes()
    manifest = WeightManifest((tensor_entry(name, "float32", (4,), data),))
    return WeightSnapshot(PolicyVersion("run", epoch, step, weights_digest(manifest)), epoch, manifest, [data])


def check(manifest: WeightManifest) -> None:
    if [entry.name for entry in manifest.tensors] != ["weight"]:
        raise PreconditionError("other weights")


def make_engine(staging: Path, *, kv: str = "keep", timeout: float = 60.0) -> tuple[ProcessEngine, FakeDriver]:
    options = ProcessEngineOptions(
        max_concurrency=2,
        max_queued=2,
        staging_directory=staging,
        kv_on_update="recompute" if kv == "recompute" else "keep",
        command_timeout_seconds=timeout,
    )
    limit = ConcurrencyLimit(options.max_concurrency, options.max_queued)
    driver = FakeDriver(limit)
    info = EngineInfo(SIGNATURE, "fake/1", LogprobMode.SAMPLED, None, 0, routing=False, max_concurrency=2)
    return ProcessEngine(driver, info, options, limit, check), driver
