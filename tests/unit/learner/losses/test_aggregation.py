"""From token losses to a step's loss."""

from __future__ import annotations

import numpy as np
import pytest

from learner.losses.aggregation import Aggregation, sequence_weights
from leeway.errors import ConfigError

LENGTHS = np.array([3, 2, 4, 1], dtype=np.int64)
LOSSES = (np.arange(1, 17) / 10).reshape(4, 4)


@pytest.mark.parametrize(
    ("aggregation", "horizon", "expected"),
    [
        ("token-mean", None, 0.72),
        ("seq-mean-token-sum", None, 1.8),
        ("fixed-horizon", 4, 0.45),
        ("seq-mean-token-mean", None, 0.775),
    ],
)
def test_worked_example(aggregation: Aggregation, horizon: int | None, expected: float) -> None:
    sums = np.array([row[:length].sum() for row, length in zip(LOSSES, LENGTHS, strict=True)])
    assert (sums * sequence_weights(aggregation, LENGTHS, horizon)).sum() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
def test_a_sequence_without_trained_tokens_does_not_divide_by_zero(aggregation: Aggregation) -> None:
    assert np.isfinite(sequence_weights(aggregation, np.zeros(2, dtype=np.int64))).all()


def test_fixed_horizon_needs_a_horizon() -> None:
    with pytest.raises(ConfigError, match="horizon"):
        sequence_weights("fixed-horizon", LENGTHS)
