"""The loop, with parts that remember what they are told."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from learner.loop import Context, Learner
from learner.run_artifacts.checkpoint import Checkpoint
from learner.run_artifacts.journal import Journal
from learner.trainer import UnusableGroupError
from leeway.config import LearnerOptions
from leeway.service.metrics import LearnerMetrics
from leeway.types import PolicyVersion
from tests.harness.learner_builders import groups


async def test_the_loop_tells_the_trainer_where_epochs_branched_off(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Refusing:
        def train_step(self, step: int, groups: object, branches: object) -> None:
            seen.append((step, branches))
            raise UnusableGroupError("group-0", "is a test")

    class Buffer:
        address = "localhost:1"

        async def reject_group(self, epoch: int, group_id: str, message: str) -> None:
            seen.append(group_id)

    head = PolicyVersion("run", 2, 6, b"")
    journal = Journal(tmp_path / "metrics.jsonl", resume_step=0)
    metrics = LearnerMetrics(CollectorRegistry())
    nothing: Any = None
    trainer: Any = Refusing()
    buffer: Any = Buffer()
    context = Context(
        trainer, buffer, nothing, nothing, journal, nothing, metrics, tmp_path, asyncio.Event(), lambda _: ()
    )
    restored = Checkpoint(tmp_path, head, (), ((1, 0), (2, 4)))
    learner = Learner(context, nothing, LearnerOptions(), nothing, restored)
    assert await learner._train(groups()) is False
    journal.close()
    assert seen == [(7, ((1, 0), (2, 4))), "group-0"]
