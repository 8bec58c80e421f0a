"""The objects that the parts of the learner's loop share, and how they wait for the replay buffer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from learner.run_artifacts.checkpoint import CheckpointStore
from learner.run_artifacts.journal import Journal
from learner.run_artifacts.receipts import ReceiptBook
from learner.trainer import Trainer
from learner.weights.publisher import Publisher
from leeway.errors import DeadlineError
from leeway.replay_client import ReplayClient
from leeway.rpc import cancel_and_wait
from leeway.service.metrics import LearnerMetrics

LAST_ANSWER_SECONDS: Final = 3.0
"""How long a stopping learner waits for the replay buffer, which may have stopped before it."""


@dataclass(frozen=True, slots=True)
class Context:
    """One learner's trainer, clients and files. None of them knows the loop."""

    trainer: Trainer
    buffer: ReplayClient
    publisher: Publisher
    checkpoints: CheckpointStore
    journal: Journal
    receipts: ReceiptBook
    metrics: LearnerMetrics
    run_directory: Path
    stop: asyncio.Event  # ends the loop cleanly, wherever it is
    task_tags: Callable[[int], Sequence[str]]  # of a training task, by its index

    async def answered(self, call: Coroutine[Any, Any, None]) -> None:
        """Wait for a call to the replay buffer; once `stop` is set, only for LAST_ANSWER_SECONDS longer.

        Raises:
            DeadlineError: no answer came in that time. The run goes on from its newest checkpoint.
        """
        answer, stopping = asyncio.create_task(call), asyncio.create_task(self.stop.wait())
        await asyncio.wait([answer, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        _, waiting = await asyncio.wait([answer], timeout=LAST_ANSWER_SECONDS)
        if waiting:
            await cancel_and_wait(answer)
            raise DeadlineError(
                f"stopped without an answer of the replay buffer at {self.buffer.address}; "
                "the run goes on from its newest checkpoint"
            )
        answer.result()
