"""What vLLM lists per token, merged or not, as columns. vLLM itself is not needed."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from inference_server.engines.vllm.outputs import sampled_tokens, signed_seed
from leeway.errors import UnavailableError
from leeway.types import ColumnKind


@dataclass
class Listed:
    start_indices: list[int] = field(default_factory=list)
    end_indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def add(self, *entries: tuple[int, float]) -> None:
        self.start_indices.append(len(self.token_ids))
        self.token_ids += [token for token, _ in entries]
        self.logprobs += [logprob for _, logprob in entries]
        self.end_indices.append(len(self.token_ids))


def test_candidates_follow_the_sampled_token() -> None:
    listed = Listed()
    listed.add((7, -3.0), (1, -0.5), (2, -1.0))
    listed.add((1, -0.25), (1, -0.25), (3, -2.0))
    tokens = sampled_tokens([7, 1], listed, 2)
    np.testing.assert_array_equal(tokens.logprobs, np.array([-3.0, -0.25], np.float32))
    np.testing.assert_array_equal(tokens.topk_token_ids, [[1, 2], [1, 3]])
    np.testing.assert_array_equal(tokens.topk_logprobs, np.array([[-0.5, -1.0], [-0.25, -2.0]], np.float32))
    kinds = [(column.kind, column.start_token, column.end_token) for column in tokens.columns(5)]
    assert kinds == [(kind, 5, 7) for kind in list(ColumnKind)[:4]]


def test_a_merged_output_lists_a_sampled_candidate_once() -> None:
    """Then it is the first entry, whatever its rank."""
    listed = Listed()
    listed.add((9, -4.0), (1, -0.5), (2, -1.0))
    listed.add((2, -1.5), (1, -0.5))
    tokens = sampled_tokens([9, 2], listed, 2)
    np.testing.assert_array_equal(tokens.topk_token_ids, [[1, 2], [1, 2]])
    np.testing.assert_array_equal(tokens.topk_logprobs, np.array([[-0.5, -1.0], [-0.5, -1.5]], np.float32))
    np.testing.assert_array_equal(tokens.logprobs, np.array([-4.0, -1.5], np.float32))


def test_without_candidates_there_are_no_such_columns() -> None:
    listed = Listed()
    listed.add((4, -1.0))
    assert [column.kind for column in sampled_tokens([4], listed, 0).columns(0)] == list(ColumnKind)[:2]


@pytest.mark.parametrize("token_ids", [[5], [4, 4]])
def test_log_probs_of_other_tokens_are_refused(token_ids: list[int]) -> None:
    listed = Listed()
    listed.add((4, -1.0))
    with pytest.raises(UnavailableError, match="log-probs of others"):
        sampled_tokens(token_ids, listed, 0)


def test_too_few_candidates_are_refused() -> None:
    listed = Listed()
    listed.add((4, -1.0), (5, -2.0))
    with pytest.raises(UnavailableError, match="2 candidates where top-3"):
        sampled_tokens([4], listed, 3)


def test_every_seed_reaches_vllm_as_one() -> None:
    seeds = [0, 1, (1 << 63) - 1, 1 << 63, (1 << 63) + 1, (1 << 64) - 2, (1 << 64) - 1]
    signed = [signed_seed(seed) for seed in seeds]
    assert all(-(1 << 63) <= seed < 1 << 63 for seed in signed)
    assert -1 not in signed  # which is none
    assert len(set(signed)) == len(seeds) - 1
