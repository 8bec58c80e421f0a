"""What the loop joins together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from learner.records.checkpoint import CheckpointStore
from learner.records.journal import Journal
from learner.records.receipts import ReceiptBook
from learner.trainer import Trainer
from learner.weights.publisher import Publisher
from leeway.replay_client import ReplayClient
from leeway.service.metrics import LearnerMetrics


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of one learner; each works without the loop."""

    trainer: Trainer
    buffer: ReplayClient
    publisher: Publisher
    checkpoints: CheckpointStore
    journal: Journal
    receipts: ReceiptBook
    metrics: LearnerMetrics
    run_directory: Path
