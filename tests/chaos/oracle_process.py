"""The oracle's own process: every link between the others passes here, and here it is judged.

learner, servers ──> proxy ──> replay buffer         servers ──> proxy ──> learner
                      │ Record, bad weather, crash points
conductor <── lines of JSON ──> this process ── at the end: export of the buffer, its log ──> violations

conductor says   arm {event, count} | go | calm | judge
it is told       ready {addresses} | hit {event} | step {step} | verdict {violations, faults, ...}
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

import grpc

from leeway.errors import NotFoundError, UnavailableError
from leeway.replay_client import ReplayClient
from leeway.rpc import Security
from leeway.types import GroupRecord, RunStatus
from leeway.v1 import common_pb2, replay_pb2, replay_pb2_grpc
from tests.chaos.account import Account, Blind, wrongly_retired
from tests.chaos.archive import gather
from tests.chaos.checkpoints import missing_checkpoint
from tests.chaos.weather import TEMPERATE, BadWeather, Climate, CrashPoint
from tests.harness.buffer_server import connected, serving
from tests.harness.oracle import Evidence
from tests.harness.recording_proxy import Call, Record, Write, recording_proxy
from tests.model.law import Broken, audit, read_log

_PROBE_SECONDS: Final = 2.0
_EXPORTS: Final = 5


@dataclass(frozen=True, slots=True)
class Scene:
    """What an oracle looks at."""

    seed: str
    run: str
    run_directory: Path
    learner_ledger: Path
    log_directory: Path
    replay_buffer: str  # where it really listens
    policy: str
    archive: Path | None = None  # holds what was removed from the log; None without retention
    earlier_run: str = ""  # one that has finished on the same buffer
    climate: Climate = TEMPERATE


def run_oracle(scene: Scene, connection: socket.socket) -> int:
    """The process."""
    asyncio.run(_Watch(scene).run(connection))
    return 0


class _Watch:
    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._record = Record()
        self._rng = Random(f"{scene.seed}/probes")
        self._weather = BadWeather(scene.climate, Random(f"{scene.seed}/weather"), self._on_hit)
        self._seen: list[str] = []  # violations found on the way
        self._probes: set[asyncio.Task[None]] = set()
        self._counts: Counter[str] = Counter()

    async def run(self, connection: socket.socket) -> None:
        reader, self._writer = await asyncio.open_connection(sock=connection)
        self._record.listeners.append(self._on_event)
        scene = self._scene
        async with (
            recording_proxy(scene.replay_buffer, self._record, self._weather) as replay_buffer,
            recording_proxy(scene.policy, self._record, self._weather) as policy,
        ):
            self._tell(ready={"replay_buffer": replay_buffer, "policy": policy})
            while line := await reader.readline():
                match json.loads(line):
                    case {"arm": {"event": str(event), "count": int(count)}}:
                        self._weather.arm(CrashPoint(event, count))
                    case {"go": _}:
                        self._weather.go()
                    case {"calm": _}:
                        self._weather.calm()
                    case {"rollback": _}:
                        self._start(self._roll_back())
                    case {"judge": "blind"}:
                        self._conclude(Blind(self._record).violations())
                    case {"judge": str(how)}:
                        await self._judge(finished=how == "finished")
                    case other:
                        raise AssertionError(other)

    def _tell(self, **message: object) -> None:
        self._writer.write(json.dumps(message).encode() + b"\n")

    def _on_hit(self, event: str) -> None:
        self._tell(hit=event)

    # On the way

    def _on_event(self, event: str, subject: Call | Write) -> None:
        if isinstance(subject, Write):
            return
        match event:
            case "Commit.begun" if not subject.repeated:
                scene = self._scene
                lines = missing_checkpoint(scene.run_directory, scene.learner_ledger, subject.request.step)
                self._seen += [f"8: {line}" for line in lines]
                self._counts["commits"] += 1
            case "Advance.ended":
                self._tell(step=subject.request.version.step)
            case "DrawBatch.ended" if not subject.repeated and self._rng.random() < 0.5:
                self._start(self._slices(subject))
            case "AcquireTickets.ended" if self._rng.random() < 0.1:
                self._start(self._cross_runs())
            case _:
                pass

    def _start(self, probe: Any) -> None:
        task = asyncio.create_task(probe)
        self._probes.add(task)
        task.add_done_callback(self._probes.discard)

    async def _slices(self, draw: Call) -> None:
        """Ask for the same draw as ranks would: what each gets must be its slice. The head may move on meanwhile."""
        whole = _group_ids(draw.replies)
        world_size = self._rng.choice((2, 3))
        async with grpc.aio.insecure_channel(self._scene.replay_buffer) as channel:
            stub: Any = replay_pb2_grpc.ReplayServiceStub(channel)
            for rank in range(world_size):
                request = replay_pb2.DrawBatchRequest()
                request.CopyFrom(draw.request)
                request.rank, request.world_size = rank, world_size
                with suppress(grpc.aio.AioRpcError):
                    got = _group_ids([reply async for reply in stub.DrawBatch(request, timeout=_PROBE_SECONDS)])
                    self._counts["slices"] += 1
                    if got != whole[rank::world_size]:
                        step = draw.request.step
                        self._seen.append(f"10: step {step} drew {whole}; rank {rank} of {world_size} gets {got}")

    async def _cross_runs(self) -> None:
        """Write what belongs to one run into another."""
        written = [write.item for write in self._record.writes[-50:] if write.acknowledged]
        if not written or not self._scene.earlier_run:
            return
        request = replay_pb2.WriteTrajectoriesRequest(
            run=self._scene.earlier_run, server_id="stranger", items=[self._rng.choice(written)]
        )

        async def requests() -> AsyncIterator[replay_pb2.WriteTrajectoriesRequest]:
            yield request

        async with grpc.aio.insecure_channel(self._scene.replay_buffer) as channel:
            stub: Any = replay_pb2_grpc.ReplayServiceStub(channel)
            with suppress(grpc.aio.AioRpcError):
                async for reply in stub.WriteTrajectories(requests(), timeout=_PROBE_SECONDS):
                    self._counts["strangers"] += 1
                    if reply.results[0].status == replay_pb2.WRITE_STATUS_ACKNOWLEDGED:
                        name = request.items[0].trajectory_id
                        self._seen.append(f"11: a chunk of {name} was acknowledged in run {request.run}")

    async def _roll_back(self) -> None:
        """Return the run to a checkpoint that is kept, as a person would; it may not be one any more."""
        manifests = sorted(self._scene.run_directory.glob("checkpoints/step-*/manifest.json"))
        with suppress(OSError, ValueError, grpc.aio.AioRpcError):
            manifest = json.loads(self._rng.choice(manifests[-3:]).read_text()) if manifests else None
            if manifest is None:
                return
            version = common_pb2.PolicyVersion(
                run=manifest["run"],
                epoch=manifest["epoch"],
                step=manifest["step"],
                digest=bytes.fromhex(manifest["digest"]),
            )
            async with grpc.aio.insecure_channel(self._scene.replay_buffer) as channel:
                stub: Any = replay_pb2_grpc.ReplayServiceStub(channel)
                request = replay_pb2.RollbackRunRequest(run=self._scene.run, version=version)
                await stub.RollbackRun(request, timeout=_PROBE_SECONDS, wait_for_ready=True)
                self._counts["rollbacks"] += 1

    # At the end

    async def _judge(self, *, finished: bool) -> None:
        scene = self._scene
        log_directory = scene.log_directory
        try:
            groups, status = await self._export()
        except NotFoundError:  # it has forgotten the run
            self._conclude(Blind(self._record).violations())
            return
        if scene.archive is not None:
            log_directory = gather(scene.archive, scene.log_directory, scene.archive.with_name(f"{scene.run}-whole"))
            async with serving(log_directory) as address, connected(address, scene.run) as whole:
                kept, groups = groups, [group async for group in whole.export_groups()]
            self._seen += [f"11: {line}" for line in wrongly_retired(self._record, groups, kept)]
            self._counts["retired"] += len(groups) - len(kept)
        evidence = Evidence(self._record, groups, status, scene.run_directory)
        try:
            law = audit(read_log(log_directory), scene.run)
            self._counts["records"] += law.num_records if law is not None else 0
        except Broken as broken:
            self._seen.append(f"{broken} (by the log)")
        self._conclude(Account(evidence, finished=finished).violations())

    async def _export(self) -> tuple[list[GroupRecord], RunStatus]:
        """What the buffer says; one that finds its index damaged ends, and is started again."""
        client = ReplayClient(self._scene.replay_buffer, self._scene.run, Security())
        try:
            for _ in range(_EXPORTS):
                with suppress(UnavailableError):
                    return [group async for group in client.export_groups()], await client.run_status()
                self._counts["exported again"] += 1
                await asyncio.sleep(_PROBE_SECONDS)
            raise UnavailableError("the buffer ended each time it was exported")
        finally:
            await client.aclose()

    def _conclude(self, violations: list[str]) -> None:
        self._tell(
            verdict={
                "violations": [*self._seen, *violations],
                "faults": dict(self._weather.faults),
                "counts": {**self._counts, "calls": len(self._record.calls), "writes": len(self._record.writes)},
            }
        )


def _group_ids(replies: list[Any]) -> list[str]:
    pieces = [piece for reply in replies for piece in reply.pieces]
    return [piece.group.group_id for piece in pieces if piece.WhichOneof("piece") == "group"]
