"""The judge's process: every link between the others passes through its proxies, and it judges them here.

learner, servers ──> proxy ──> replay buffer         servers ──> proxy ──> learner
                      │ Record, network faults, crash points
driver <── JSON messages ──> this process ── at the end: export of the buffer, its log ──> violations

the driver says   arm {event, count} | go | rollback | end_faults | judge
it is told        ready {addresses} | hit {event} | step {step} | verdict {violations, faults, ...}
"""

from __future__ import annotations

import asyncio
import json
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
from tests.chaos.archive import gather
from tests.chaos.judge import ChaosOracle, missing_checkpoint, violations_without_export, wrongly_retired
from tests.chaos.network_faults import USUAL_FAULTS, CrashPoint, FaultRates, FaultyNetwork
from tests.harness.buffer_server import connected, serving
from tests.harness.oracle import Evidence
from tests.harness.processes import Message, hear, tell
from tests.harness.recording_proxy import Call, Record, Write, recording_proxy

_PROBE_SECONDS: Final = 2.0
_EXPORTS: Final = 5


@dataclass(frozen=True, slots=True)
class Scope:
    """The run that is judged."""

    seed: str
    run: str
    run_directory: Path
    learner_ledger: Path
    log_directory: Path
    replay_buffer: str  # where it really listens
    policy: str
    archive: Path | None = None  # holds what was removed from the log; None without retention
    earlier_run: str = ""  # one that has finished on the same buffer
    rates: FaultRates = USUAL_FAULTS


def judge_run(connection: Any, scope: Scope) -> int:
    """Be the judge of a run."""
    asyncio.run(_Judge(connection, scope).run())
    return 0


class _Judge:
    def __init__(self, connection: Any, scope: Scope) -> None:
        self._connection = connection
        self._scope = scope
        self._record = Record()
        self._rng = Random(f"{scope.seed}/probes")
        self._network = FaultyNetwork(scope.rates, Random(f"{scope.seed}/network"), lambda event: self._tell(hit=event))
        self._seen: list[str] = []  # violations found during the run
        self._probes: set[asyncio.Task[None]] = set()
        self._counts: Counter[str] = Counter()

    async def run(self) -> None:
        messages: asyncio.Queue[Message] = asyncio.Queue()
        hear(self._connection, messages.put_nowait)
        self._record.listeners.append(self._on_event)
        scope = self._scope
        async with (
            recording_proxy(scope.replay_buffer, self._record, self._network) as replay_buffer,
            recording_proxy(scope.policy, self._record, self._network) as policy,
        ):
            self._tell(ready={"replay_buffer": replay_buffer, "policy": policy})
            while True:
                match await messages.get():
                    case {"arm": {"event": str(event), "count": int(count)}}:
                        self._network.arm(CrashPoint(event, count))
                    case {"go": _}:
                        self._network.go()
                    case {"end_faults": _}:
                        self._network.end_faults()
                    case {"rollback": _}:
                        self._start(self._roll_back())
                    case {"judge": "blind"}:
                        self._conclude(violations_without_export(self._record))
                    case {"judge": str(how)}:
                        await self._judge(finished=how == "finished")
                    case {"do": "end"}:
                        return
                    case other:
                        raise AssertionError(other)

    def _tell(self, **message: object) -> None:
        tell(self._connection, **message)

    # During the run

    def _on_event(self, event: str, subject: Call | Write) -> None:
        if isinstance(subject, Write):
            return
        match event:
            case "Commit.begun" if not subject.repeated:
                scope = self._scope
                lines = missing_checkpoint(scope.run_directory, scope.learner_ledger, subject.request.step)
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
        """Ask for the same draw as ranks would: each must get its slice. A head that has moved on refuses."""
        whole = _group_ids(draw.replies)
        world_size = self._rng.choice((2, 3))
        async with grpc.aio.insecure_channel(self._scope.replay_buffer) as channel:
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
        if not written or not self._scope.earlier_run:
            return
        request = replay_pb2.WriteTrajectoriesRequest(
            run=self._scope.earlier_run, server_id="stranger", items=[self._rng.choice(written)]
        )

        async def requests() -> AsyncIterator[replay_pb2.WriteTrajectoriesRequest]:
            yield request

        async with grpc.aio.insecure_channel(self._scope.replay_buffer) as channel:
            stub: Any = replay_pb2_grpc.ReplayServiceStub(channel)
            with suppress(grpc.aio.AioRpcError):
                async for reply in stub.WriteTrajectories(requests(), timeout=_PROBE_SECONDS):
                    self._counts["strangers"] += 1
                    if reply.results[0].status == replay_pb2.WRITE_STATUS_ACKNOWLEDGED:
                        name = request.items[0].trajectory_id
                        self._seen.append(f"11: a chunk of {name} was acknowledged in run {request.run}")

    async def _roll_back(self) -> None:
        """Return the run to a checkpoint that is kept, as a person would; it may not be one any more."""
        manifests = sorted(self._scope.run_directory.glob("checkpoints/step-*/manifest.json"))
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
            async with grpc.aio.insecure_channel(self._scope.replay_buffer) as channel:
                stub: Any = replay_pb2_grpc.ReplayServiceStub(channel)
                request = replay_pb2.RollbackRunRequest(run=self._scope.run, version=version)
                await stub.RollbackRun(request, timeout=_PROBE_SECONDS, wait_for_ready=True)
                self._counts["rollbacks"] += 1

    # At the end

    async def _judge(self, *, finished: bool) -> None:
        scope = self._scope
        log_directory = scope.log_directory
        try:
            groups, status = await self._export()
        except NotFoundError:  # it has forgotten the run
            self._conclude(violations_without_export(self._record))
            return
        if scope.archive is not None:
            log_directory = gather(scope.archive, scope.log_directory, scope.archive.with_name(f"{scope.run}-whole"))
            async with serving(log_directory) as address, connected(address, scope.run) as whole:
                kept, groups = groups, [group async for group in whole.export_groups()]
            self._seen += [f"11: {line}" for line in wrongly_retired(self._record, groups, kept)]
            self._counts["retired"] += len(groups) - len(kept)
        oracle = ChaosOracle(
            Evidence(
                self._record,
                groups,
                status,
                scope.run_directory,
                log_directory,
                finished=finished,
                learner_files=False,  # a journal ends where the power went
            )
        )
        self._counts["records"] += oracle.num_records
        self._conclude(oracle.violations())

    async def _export(self) -> tuple[list[GroupRecord], RunStatus]:
        """The buffer's export and status; one that finds its index damaged ends, and is started again."""
        client = ReplayClient(self._scope.replay_buffer, self._scope.run, Security())
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
                "faults": dict(self._network.faults),
                "counts": {**self._counts, "calls": len(self._record.calls), "writes": len(self._record.writes)},
            }
        )


def _group_ids(replies: list[Any]) -> list[str]:
    pieces = [piece for reply in replies for piece in reply.pieces]
    return [piece.group.group_id for piece in pieces if piece.WhichOneof("piece") == "group"]
