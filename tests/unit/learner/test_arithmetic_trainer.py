"""The rehearsal's trainer: its weights say what it was trained on, and it runs without torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from learner.arithmetic_trainer import ArithmeticTrainer
from leeway.arithmetic import ArithmeticWeights, next_distribution, read_weights
from leeway.errors import CorruptDataError
from leeway.types import TrajectoryGroup
from tests.deadlines import WAIT_SECONDS
from tests.harness.learner_builders import groups

ROOT = Path(__file__).parents[3]
PARTS = ("learner.__main__", "learner.arithmetic_trainer", "inference_server.server", "leeway.cli.run")


def digest_after(*steps: list[TrajectoryGroup]) -> ArithmeticWeights:
    trainer = ArithmeticTrainer()
    for number, batch in enumerate(steps, start=1):
        trainer.train_step(number, batch)
    return read_weights(*trainer.published())


def test_weights_tell_apart_everything_a_run_could_have_done_otherwise() -> None:
    first, second, third = groups(count=3)
    better = replace(first, trajectories=(replace(first.trajectories[0], reward=0.5), *first.trajectories[1:]))
    histories = [
        digest_after(),
        digest_after([first, second]),
        digest_after([second, first]),
        digest_after([better, second]),
        digest_after([first], [second]),
        digest_after([first, second], [third]),
    ]
    assert len(set(histories)) == len(histories)
    assert digest_after([first], [second]) == histories[4]


def test_a_restored_trainer_goes_on_alike(tmp_path: Path) -> None:
    first, second, _ = groups(count=3)
    trainer, restored = ArithmeticTrainer(), ArithmeticTrainer()
    trainer.train_step(1, [first])
    trainer.save(tmp_path)
    restored.load(tmp_path)
    for each in (trainer, restored):
        each.train_step(2, [second])
    assert restored.published() == trainer.published()
    with pytest.raises(CorruptDataError, match="cannot be read"):
        restored.load(tmp_path / "missing")


def test_policy_logprobs_are_those_of_the_weights_before_the_step() -> None:
    batch = groups(count=1)
    trainer = ArithmeticTrainer()
    before = read_weights(*trainer.published())
    result = trainer.train_step(1, batch)
    for trajectory in batch[0].trajectories:
        ids, logprobs = trajectory.token_ids.tolist(), result.policy_logprobs[trajectory.trajectory_id]
        trained = np.flatnonzero(trajectory.loss_mask).tolist()
        assert len(trained) == len(logprobs)
        temperature = next(s.sampling.temperature for s in trajectory.segments if s.sampling is not None)
        law = next_distribution(before, trained[-1], ids[trained[-1] - 1], float(np.float32(temperature)))
        assert logprobs[-1] == np.float32(law.logprob(ids[trained[-1]]))


@pytest.mark.processes
def test_a_rehearsal_needs_no_torch() -> None:
    blocked = "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'tokenizers')))"
    program = "; ".join([blocked, *(f"import {part}" for part in PARTS)])
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=WAIT_SECONDS)
