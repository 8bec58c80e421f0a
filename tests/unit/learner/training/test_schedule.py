from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from learner.training.optimizer import Schedule, scheduled_learning_rate
from leeway.config import TrainingOptions
from tests.harness.learner_builders import dense_model, groups, trainer


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("constant", 1, 0.1),
        ("constant", 5, 0.5),
        ("constant", 10, 1),
        ("constant", 10_000, 1),
        ("linear", 5, 0.5),
        ("linear", 10, 1),
        ("linear", 60, 0.55),
        ("linear", 110, 0.1),
        ("linear", 111, 0.1),
        ("cosine", 5, 0.5),
        ("cosine", 10, 1),
        ("cosine", 35, 0.1 + 0.9 * (1 + 2**-0.5) / 2),
        ("cosine", 60, 0.55),
        ("cosine", 110, 0.1),
        ("cosine", 5000, 0.1),
    ],
)
def test_learning_rates(schedule: Schedule, step: int, expected: float) -> None:
    assert scheduled_learning_rate(schedule, 1.0, 0.1, 10, 110, step) == pytest.approx(expected, rel=1e-12)


def test_without_warm_up_the_first_step_is_the_highest() -> None:
    rates = [scheduled_learning_rate("cosine", 1.0, 0.0, 0, 4, step) for step in range(1, 6)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == rates[-2] == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"schedule": "linear"}, "set `decay_steps`"),
        ({"decay_steps": 10}, "set `decay_steps`"),
        ({"schedule": "cosine", "decay_steps": 5, "warmup_steps": 5}, "more than `warmup_steps`"),
        ({"learning_rate": 1e-4, "learning_rate_floor": 1e-3}, "must not be above `learning_rate`"),
    ],
)
def test_options_that_contradict_each_other_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainingOptions.model_validate(wrong)


def test_a_trainer_follows_its_schedule() -> None:
    options = TrainingOptions(
        learning_rate=1e-3, warmup_steps=2, schedule="linear", decay_steps=4, learning_rate_floor=1e-4
    )
    taught = trainer(dense_model(), options)
    rates = [taught.train_step(step, groups()).statistics["learning_rate"] for step in range(1, 6)]
    assert np.allclose(rates, [5e-4, 1e-3, 5.5e-4, 1e-4, 1e-4], rtol=1e-12)
