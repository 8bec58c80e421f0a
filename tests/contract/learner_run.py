"""A learner's whole loop on a tiny model and a real replay buffer, over a log of groups that is always the same."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from prometheus_client import CollectorRegistry
from transformers import PreTrainedModel

from learner.loop import Context, Learner
from learner.run_artifacts.checkpoint import CheckpointStore
from learner.run_artifacts.journal import Journal
from learner.run_artifacts.receipts import Options, ReceiptBook, deciding_options, read_receipts
from learner.run_artifacts.recompute import Difference, find_start, recompute
from learner.trainer import Trainer
from learner.weights.publisher import Publisher
from leeway import codec
from leeway.config import EvaluationOptions, LearnerOptions
from leeway.service.metrics import LearnerMetrics
from leeway.types import (
    Column,
    ColumnKind,
    FinishReason,
    GroupRecord,
    PolicyVersion,
    Purpose,
    RunSpec,
    SamplingParams,
    Segment,
    SegmentKind,
    TicketMember,
    TrajectoryChunk,
    TrajectoryClose,
    VersionSpan,
    WriteItem,
)
from leeway.weights.digests import weights_digest
from tests.deadlines import WAIT_SECONDS
from tests.harness.buffer_server import connected, write
from tests.harness.learner_builders import VOCABULARY, dense_model, moe_model, random_routing
from tests.harness.learner_builders import trainer as make_trainer
from tests.harness.replay_builders import DATASET, MOMENT

RUN = "learner-run"
STEPS = 4


def learner_options(**training: Any) -> LearnerOptions:
    values = {"learning_rate": 1e-3, "warmup_steps": 3, "publish_dtype": "float32", **training}
    return LearnerOptions.model_validate(
        {"training": values, "checkpoint_every_steps": 2, "keep_checkpoints": 3, "draw_timeout_seconds": WAIT_SECONDS}
    )


def run_spec(trainer: Trainer, steps: int = STEPS) -> RunSpec:
    root = PolicyVersion(RUN, 0, 0, weights_digest(trainer.published()[0]))
    return RunSpec(
        run=RUN,
        groups_per_step=2,
        members=3,
        max_staleness=steps,  # everything may be sampled from the first weights
        total_steps=steps,
        seed=7,
        train_task_count=5,
        sampling=SamplingParams(max_tokens=16, routing=trainer.signature.moe_layers > 0),
        signature=trainer.signature,
        dataset_digest=DATASET,
        root=root,
        max_attempts=3,
    )


def trajectory_items(member: TicketMember, attempt: int, version: PolicyVersion, *, routing: bool) -> list[WriteItem]:
    """A trajectory whose content depends on nothing but its id."""
    seed = int.from_bytes(hashlib.sha256(member.trajectory_id.encode()).digest()[:4], "little")
    rng = np.random.default_rng(seed)
    prompt, n = 3, int(rng.integers(6, 14))
    columns = [
        Column(ColumnKind.TOKEN_IDS, 0, n, rng.integers(0, VOCABULARY, n).astype(np.int32)),
        Column(ColumnKind.BEHAVIOR_LOGPROBS, prompt, n, -rng.uniform(0.5, 6.0, n - prompt).astype(np.float32)),
    ]
    if routing:
        columns.append(Column(ColumnKind.ROUTING, 0, n - 1, random_routing(n - 1, seed)))
    chunk = codec.encode_chunk(
        TrajectoryChunk(
            columns=tuple(columns),
            segments=(
                Segment(SegmentKind.PROMPT, 0, prompt),
                Segment(SegmentKind.MODEL, prompt, n, True, SamplingParams(max_tokens=16, seed=member.seed), "fake/1"),
            ),
            version_spans=(VersionSpan(prompt, n, version),),
        )
    )
    digest = codec.chain_digest(codec.EMPTY_CHAIN, chunk)
    close = TrajectoryClose(1, n, digest, FinishReason.STOP, float(member.member == 0), MOMENT, MOMENT)
    return [WriteItem(member.trajectory_id, attempt, 0, chunk), WriteItem(member.trajectory_id, attempt, 1, close)]


def tags_of(task_index: int) -> tuple[str, ...]:
    """Each task is odd or even; the first is also named."""
    return (("even", "odd")[task_index % 2], *(["first"] if task_index == 0 else []))


class LearnerRun:
    """A run in a directory, served at an address; `train` is one incarnation of its learner."""

    def __init__(self, directory: Path, address: str, *, moe: bool = False, steps: int = STEPS) -> None:
        self.directory = directory
        self.address = address
        self.moe = moe
        self.steps = steps
        self.options = learner_options(routing_replay=moe)
        self.store = CheckpointStore(directory / "checkpoints", keep=self.options.keep_checkpoints)

    def model(self) -> PreTrainedModel:
        return moe_model() if self.moe else dense_model()

    def trainer(self) -> Trainer:
        return make_trainer(self.model(), self.options.training)

    def deciding(self, options: LearnerOptions | None = None) -> Options:
        return deciding_options(options or self.options, self.trainer(), seed=7)

    async def fill(self) -> None:
        """Write every group that the run will ever train on; returns when they are on disk."""
        trainer = self.trainer()
        spec = run_spec(trainer, self.steps)
        async with connected(self.address, RUN) as client:
            await client.join_run("s0", trainer.signature, DATASET, WAIT_SECONDS)
            tickets, *_ = await client.acquire_tickets("s0", spec.root, 1000, WAIT_SECONDS)
            assert len(tickets) == spec.groups_per_step * self.steps
            await write(
                client,
                [
                    item
                    for ticket in tickets
                    for member in ticket.members
                    for item in trajectory_items(member, ticket.attempt, spec.root, routing=self.moe)
                ],
            )

    async def train(self, *, until: int | None = None, crash_at: int | None = None, slow_save: bool = False) -> bool:
        """One incarnation of the learner; returns whether the run is finished.

        It is stopped cleanly after step `until`, and dies in the middle of step `crash_at`. With `slow_save` the
        checkpoint of step 2 is not written before step 3 is trained.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        trainer = self.trainer()
        spec = run_spec(trainer, self.steps)
        restored = self.store.newest() or self.store.save(spec.root, [], [], trainer.save)
        trainer.load(restored.directory)
        self.registry = CollectorRegistry()
        metrics = LearnerMetrics(self.registry)
        stop = asyncio.Event()
        journal = Journal(self.directory / "metrics.jsonl", resume_step=restored.version.step)
        receipts = ReceiptBook(self.directory, self.deciding(), resume_step=restored.version.step)
        async with connected(self.address, RUN) as client:
            learner = Learner(
                Context(
                    cast("Trainer", _StoppingTrainer(trainer, until, crash_at, stop, slow_save=slow_save)),
                    client,
                    Publisher(RUN, trainer.signature, metrics),
                    self.store,
                    journal,
                    receipts,
                    metrics,
                    self.directory,
                    stop,
                    tags_of,
                ),
                spec,
                self.options,
                EvaluationOptions(tasks=0),
                restored,
            )
            filling = asyncio.create_task(self.fill()) if restored.version.step == 0 else None
            try:
                async with asyncio.timeout(WAIT_SECONDS):
                    return await learner.run()
            finally:
                if filling is not None:
                    await filling
                journal.close()
                receipts.close()

    async def recompute(
        self,
        step: int,
        *,
        options: LearnerOptions | None = None,
        change: Callable[[GroupRecord], GroupRecord] = lambda record: record,
        trainer: Trainer | None = None,
    ) -> Difference | None:
        """Compute a step again; `change` tampers with what the log gives."""
        receipts = read_receipts(self.directory)
        async with connected(self.address, RUN) as client:

            async def export(at: int) -> AsyncIterator[GroupRecord]:
                async for record in client.export_groups(purpose=Purpose.TRAIN, step=at):
                    yield change(record)

            return await recompute(
                trainer or make_trainer(self.model(), (options or self.options).training),
                find_start(self.store, receipts, step),
                receipts,
                step,
                self.deciding(options),
                export,
                lambda _: None,
            )


class CrashError(Exception):
    """The learner dies."""


class _StoppingTrainer:
    """A trainer that sets the stop event once it has trained a step, or dies in one."""

    def __init__(
        self, trainer: Trainer, until: int | None, crash_at: int | None, stop: asyncio.Event, *, slow_save: bool
    ) -> None:
        self._trained_3 = threading.Event()
        self._slow_save = slow_save
        self._trainer = trainer
        self._until = until
        self._crash_at = crash_at
        self._stop = stop
        self._loop = asyncio.get_running_loop()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)

    def train_step(self, step: int, groups: Any, branches: Any) -> Any:
        result = self._trainer.train_step(step, groups, branches)
        if step == 3:
            self._trained_3.set()
        if step == self._crash_at:
            raise CrashError
        if step == self._until:
            self._loop.call_soon_threadsafe(self._stop.set)
        return result

    def begin_save(self, directory: Path) -> Callable[[], None]:
        finish_save = self._trainer.begin_save(directory)

        def finish() -> None:
            assert not self._slow_save or self._trained_3.wait(WAIT_SECONDS), "training waits for the checkpoint"
            finish_save()

        return finish


def with_flipped_byte(record: GroupRecord, trajectory_id: str) -> GroupRecord:
    """The record with one byte of one trajectory's chunks changed."""
    trajectories = tuple(
        replace(t, chunks=(bytes([*t.chunks[0][:-1], t.chunks[0][-1] ^ 1]), *t.chunks[1:]))
        if t.trajectory_id == trajectory_id
        else t
        for t in record.trajectories
    )
    return replace(record, trajectories=trajectories)
