from __future__ import annotations

import numpy as np
import pytest
import torch

from inference_server.engines.transformers.sampling import sample, uniforms


def test_tokens_follow_the_distribution() -> None:
    logits = torch.tensor([[0.3, -1.2, 2.0, 0.0, -3.0]])
    num_draws = 20_000
    grid = (np.arange(num_draws) + 0.5) / num_draws
    sampled = sample(logits.expand(num_draws, -1), torch.full((num_draws,), 0.7), grid, topk=0)
    expected = torch.softmax(logits[0] / 0.7, dim=-1).numpy()
    counts = np.bincount(sampled.token_ids, minlength=5)
    np.testing.assert_allclose(counts / num_draws, expected, atol=1e-4)
    np.testing.assert_allclose(np.exp(sampled.logprobs), expected[sampled.token_ids], rtol=1e-5)


def test_tokens_of_probability_zero_are_never_chosen() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(4, -1)
    draws = np.array([0.0, 0.5 - 2.0**-53, 0.5, 1.0 - 2.0**-53])
    sampled = sample(logits, torch.ones(4), draws, topk=0)
    assert sampled.token_ids[:3].tolist() == [1, 1, 3]
    assert np.isfinite(sampled.logprobs[:3]).all()


def test_candidates_are_of_the_same_distribution() -> None:
    logits = torch.tensor([[0.3, -1.2, 2.0, 0.0, -3.0]])
    sampled = sample(logits, torch.tensor([0.5]), np.array([0.4]), topk=3)
    logprobs = torch.log_softmax(logits[0] / 0.5, dim=-1)
    assert sampled.topk_token_ids is not None and sampled.topk_logprobs is not None  # noqa: PT018
    assert sampled.topk_token_ids.tolist() == [[2, 0, 3]]
    np.testing.assert_allclose(sampled.topk_logprobs[0], logprobs[[2, 0, 3]].numpy(), rtol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_an_error(bad: float) -> None:
    logits = torch.zeros(2, 4)
    logits[1, 2] = bad
    with pytest.raises(FloatingPointError, match="not finite"):
        sample(logits, torch.ones(2), np.array([0.1, 0.9]), topk=0)


def test_uniforms_depend_on_seed_and_position_only() -> None:
    seeds = np.array([0, 1, 2**64 - 1, 7], np.uint64)
    positions = np.array([3, 3, 0, 9], np.uint64)
    together = uniforms(seeds, positions)
    alone = [uniforms(seeds[i : i + 1], positions[i : i + 1])[0] for i in range(4)]
    assert together.tolist() == alone


def test_uniforms_are_uniform_along_positions_and_along_seeds() -> None:
    count = np.arange(40_000, dtype=np.uint64)
    for draws in (uniforms(np.full_like(count, 5), count), uniforms(count, np.full_like(count, 5))):
        assert draws.min() >= 0
        assert draws.max() < 1
        assert len(set(draws.tolist())) == len(count)
        histogram = np.histogram(draws, bins=20, range=(0, 1))[0]
        assert ((histogram - 2000) ** 2 / 2000).sum() < 43.8  # chi-square, 19 degrees of freedom, p = 0.001
        assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 0.02
