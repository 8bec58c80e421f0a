"""From token losses to the loss of a step, as one weight per sequence.

Every aggregation here is sum_s w_s sum_t loss_(s,t): the weights come from the trained lengths of the WHOLE step, so
the losses of micro-batches simply add up to the loss of the batch. Needs no torch.

Shape legend: N sequences of a step.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from leeway.config.losses import Aggregation
from leeway.errors import ConfigError


def sequence_weights(
    aggregation: Aggregation, trained_lengths: NDArray[np.int64], horizon: int | None = None
) -> NDArray[np.float64]:
    """The weight of each sequence's summed token loss.

    | aggregation | w_s |
    |---|---|
    | seq-mean-token-sum | 1 / N (arXiv 2602.04879, equation 12) |
    | fixed-horizon | 1 / (N horizon) (Dr. GRPO, arXiv 2503.20783) |
    | token-mean | 1 / sum of lengths (DAPO, arXiv 2503.14476) |
    | seq-mean-token-mean | 1 / (N length_s) (GRPO, arXiv 2402.03300) |

    Args:
        aggregation: one of the names above.
        trained_lengths: [N] tokens in the loss, per sequence; sequences without any count in N.
        horizon: a fixed number of tokens, only for fixed-horizon.

    Returns:
        [N] float64.

    Raises:
        ConfigError: fixed-horizon without a horizon.

    Example:
        losses arange(1..16)/10 as 4x4, lengths [3, 2, 4, 1]: token-mean .72; seq-mean-token-sum 1.8; fixed-horizon 4:
        .45; seq-mean-token-mean .775.
    """
    count = trained_lengths.shape[0]
    ones = np.ones(count, dtype=np.float64)
    match aggregation:
        case "seq-mean-token-sum":
            return ones / count
        case "fixed-horizon":
            if horizon is None:
                raise ConfigError("learner: aggregation fixed-horizon needs a horizon: set learner.training.horizon")
            return ones / (count * horizon)
        case "token-mean":
            return ones / max(int(trained_lengths.sum()), 1)
        case "seq-mean-token-mean":
            return ones / (count * np.maximum(trained_lengths, 1))
