"""The losses against algorithm's worked examples and an independent float64 oracle."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learner.losses.divergences import binary_kl, binary_tv, log_one_minus_exp
from learner.losses.form import Candidates, TokenBatch, load_algorithm, load_measure, token_losses, token_values
from leeway.config.algorithms import ALGORITHMS, INFINITY, LossParameters
from leeway.config.losses import LossOptions
from tests.unit.learner.losses import oracle
from tests.unit.learner.losses.oracle import Numbers, Token

MU = [1e-4, 0.99, 0.5, 0.5, 0.5, 0.3, 0.4, 0.05]
PI = [0.01, 0.8, 0.75, 0.75, 0.2, 0.22, 0.55, 0.9]
ADVANTAGES = [1, -1, 1, -1, -0.5, -0.5, 0, 2]
TV = [0.0099, 0.19, 0.25, 0.25, 0.3, 0.08, 0.15, 0.85]
KL = [0.009488818801, 0.1810049606, 0.1438410362, 0.1438410362, 0.2231435513, 0.01729696924, 0.04522775102, 1.994208621]


def tokens(
    mu: list[float],
    pi: list[float],
    advantages: list[float],
    mask: list[bool] | None = None,
    dtype: torch.dtype = torch.float64,
) -> TokenBatch:
    return TokenBatch(
        policy_logprobs=torch.tensor([math.log(p) for p in pi], dtype=dtype, requires_grad=True),
        behavior_logprobs=torch.tensor([math.log(p) for p in mu], dtype=dtype),
        advantages=torch.tensor(advantages, dtype=dtype),
        loss_mask=torch.tensor([True] * len(mu) if mask is None else mask),
        sequence_ids=torch.zeros(len(mu), dtype=torch.int64),
        candidates=candidates(len(mu), dtype),
        proximal_logprobs=torch.tensor([math.log(p) for p in mu], dtype=dtype),
    )


def candidates(count: int, dtype: torch.dtype) -> Candidates:
    """Two unlikely ones for each token."""
    logprobs = torch.full((count, 2), math.log(1e-3), dtype=dtype)
    return Candidates(logprobs, logprobs - 0.1, torch.ones((count, 2), dtype=torch.bool))


def run(name: str, batch: TokenBatch, parameters: LossParameters) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, kept, and d sum(loss) / d log pi."""
    measure = load_measure(ALGORITHMS[name])
    if measure is not None:
        batch = replace(batch, statistics=measure(token_values(batch), parameters, 1))
    losses, terms = token_losses(batch, load_algorithm(ALGORITHMS[name]), parameters)
    (gradient,) = torch.autograd.grad(losses.sum(), batch.policy_logprobs)
    return losses.detach(), terms.kept, gradient


def both(delta: float, truncation: float) -> LossParameters:
    return LossParameters(delta, delta, truncation)


@pytest.mark.parametrize(
    ("name", "parameters", "kept", "token_mean"),
    [
        ("pg-is", both(INFINITY, INFINITY), "11111111", 57.90657642),
        ("cispo", both(INFINITY, 5.0), "11111111", 2.877758789),
        ("grpo-clip-higher", LossParameters(0.2, 0.28, INFINITY), "01010010", -0.07648014124),
        ("dppo-binary-tv", both(0.2, INFINITY), "11010110", 57.41874966),
        ("dppo-binary-tv", both(0.2, 5.0), "11010110", 2.732353704),
        ("dppo-binary-kl", both(0.05, INFINITY), "10010110", 57.44128942),
    ],
)
def test_worked_example(name: str, parameters: LossParameters, kept: str, token_mean: float) -> None:
    losses, mask, _ = run(name, tokens(MU, PI, ADVANTAGES), parameters)
    assert "".join(str(int(m)) for m in mask) == kept
    assert losses.mean().item() == pytest.approx(token_mean, rel=5e-10)


def test_worked_divergences() -> None:
    mu, pi = torch.tensor(MU, dtype=torch.float64).log(), torch.tensor(PI, dtype=torch.float64).log()
    np.testing.assert_allclose(binary_tv(mu, pi).numpy(), TV, rtol=1e-12)
    np.testing.assert_allclose(binary_kl(mu, pi).numpy(), KL, rtol=5e-10)


def test_grpo_defaults_are_symmetric() -> None:
    assert ALGORITHMS["grpo"].defaults == LossParameters(0.2, 0.2, INFINITY)
    assert ALGORITHMS["grpo-clip-higher"].defaults == LossParameters(0.2, 0.28, INFINITY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tie_at_the_threshold_is_kept(dtype: torch.dtype) -> None:
    batch = tokens([0.25, 0.25, 0.5, 0.5], [0.5, 0.50001, 0.25, 0.24999], [1, 1, -1, -1], dtype=dtype)
    _, kept, _ = run("dppo-binary-tv", batch, both(0.25, INFINITY))
    assert kept.tolist() == [True, False, True, False]


def test_thresholds_belong_to_the_sign_of_the_advantage() -> None:
    batch = tokens([0.25, 0.5], [0.5, 0.25], [1, -1])
    assert run("dppo-binary-tv", batch, LossParameters(0.3, 0.2, INFINITY))[1].tolist() == [False, True]
    assert run("dppo-binary-tv", batch, LossParameters(0.2, 0.3, INFINITY))[1].tolist() == [True, False]


def test_a_step_back_towards_the_behavior_policy_is_never_masked() -> None:
    """A > 0 with r < 1, and A < 0 with r > 1, return to the trust region however far outside they are."""
    batch = tokens([0.9, 0.01], [0.01, 0.9], [1, -1])
    for name in ("dppo-binary-tv", "dppo-binary-kl", "grpo"):
        assert run(name, batch, both(0.05, INFINITY))[1].tolist() == [True, True]


@pytest.mark.parametrize("name", ["pg-is", "cispo", "grpo", "dppo-binary-tv", "dppo-binary-kl"])
def test_gradient_in_float32_is_minus_advantage_times_weight(name: str) -> None:
    """Exactly: the truncated weight keeps its gradient, and a masked token has none."""
    rng = np.random.default_rng(1)
    mu, pi = rng.uniform(1e-6, 1, 4000), rng.uniform(1e-6, 1, 4000)
    advantages = rng.normal(size=4000)
    batch = tokens(mu.tolist(), pi.tolist(), advantages.tolist(), dtype=torch.float32)
    _, kept, gradient = run(name, batch, LossParameters(0.1, 0.15, 3.0))
    expected = oracle.answers(
        name,
        [Token(math.log(m), math.log(p), a) for m, p, a in zip(mu, pi, advantages, strict=True)],
        Numbers(low=0.1, high=0.15, truncation=3.0),
    )
    agree = kept.numpy() == np.array([answer.kept for answer in expected])
    assert agree.mean() > 0.999  # float32 may round a token at the threshold to the other side
    np.testing.assert_allclose(gradient.numpy()[agree], np.array([a.gradient for a in expected])[agree], rtol=1e-5)
    assert (gradient[~kept] == 0).all()
    assert kept.all() == (name in ("pg-is", "cispo"))


@pytest.mark.parametrize("name", list(ALGORITHMS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_ratios_stay_finite(name: str, dtype: torch.dtype) -> None:
    logs = torch.tensor([math.log(1e-8), -1e-12, 0.0, -80.0], dtype=dtype)
    mu, pi = (grid.flatten() for grid in torch.meshgrid(logs, logs, indexing="ij"))
    for advantage in (1.0, -1.0, 0.0):
        batch = TokenBatch(
            pi.clone().requires_grad_(),
            mu,
            torch.full_like(mu, advantage),
            torch.ones_like(mu, dtype=torch.bool),
            torch.zeros_like(mu, dtype=torch.int64),
            candidates(mu.shape[0], dtype),
            proximal_logprobs=mu,
        )
        parameters = ALGORITHMS[name].defaults
        if (
            dtype == torch.float32
        ):  # the ratios here reach e^80, whose multiple by drpo's factor needs no cap in float64
            parameters = replace(parameters, truncation=min(parameters.truncation, 1e30))
        losses, _, gradient = run(name, batch, parameters)
        assert torch.isfinite(losses).all()
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_padding_of_any_value_gives_nothing(name: str) -> None:
    """The mask comes before the exponential: 0 * inf would be NaN."""
    batch = tokens([0.5] * 6, [0.4] * 6, [-1] * 6, mask=[True, False, False, False, False, True], dtype=torch.float32)
    junk = torch.tensor([0, math.nan, math.inf, -math.inf, 1e30, 0])
    policy = (batch.policy_logprobs.detach() + junk).requires_grad_()
    behavior = batch.behavior_logprobs - junk
    assert batch.candidates is not None
    assert batch.proximal_logprobs is not None
    spoiled = replace(
        batch,
        policy_logprobs=policy,
        behavior_logprobs=behavior,
        advantages=batch.advantages + junk,
        candidates=replace(
            batch.candidates,
            behavior_logprobs=batch.candidates.behavior_logprobs + junk[:, None],
            policy_logprobs=batch.candidates.policy_logprobs - junk[:, None],
        ),
        proximal_logprobs=batch.proximal_logprobs + junk,
    )
    losses, _, gradient = run(name, spoiled, ALGORITHMS[name].defaults)
    assert (losses[1:5] == 0).all()
    assert (gradient[1:5] == 0).all()
    assert torch.isfinite(losses).all()
    clean_losses, _, clean_gradient = run(name, batch, ALGORITHMS[name].defaults)
    assert torch.equal(losses, clean_losses)
    assert torch.equal(gradient, clean_gradient)


@pytest.mark.parametrize("name", ["dppo-binary-tv", "dppo-binary-kl", "grpo"])
def test_a_masked_token_is_zero_even_where_its_ratio_overflowed(name: str) -> None:
    """With C infinite, 0 * inf would be NaN."""
    policy = torch.tensor([math.log(0.9)], requires_grad=True)
    batch = TokenBatch(policy, torch.tensor([-120.0]), torch.ones(1), torch.tensor([True]), torch.tensor([0]))
    losses, _, gradient = run(name, batch, both(0.1, INFINITY))
    assert (losses.item(), gradient.item()) == (0.0, 0.0)


def test_bfloat16_log_probs_are_judged_in_float32() -> None:
    mu, pi = torch.tensor([0.5] * 1, dtype=torch.bfloat16).log(), torch.tensor([0.4] * 1, dtype=torch.bfloat16).log()
    batch = TokenBatch(pi.requires_grad_(), mu, torch.tensor([-1.0]), torch.tensor([True]), torch.tensor([0]))
    losses, terms = token_losses(batch, load_algorithm(ALGORITHMS["dppo-binary-tv"]), both(0.2, INFINITY))
    assert losses.dtype == terms.weight.dtype == torch.float32


def test_binary_kl_at_certainty() -> None:
    """0 log 0 = 0, and a certain policy is infinitely far from an uncertain one."""
    logs = torch.tensor([0.0, 0.0, math.log(0.5)], dtype=torch.float64)
    policy = torch.tensor([0.0, math.log(0.5), 0.0], dtype=torch.float64)
    assert binary_kl(logs, policy).tolist() == [0.0, math.log(2), math.inf]


@settings(max_examples=200, deadline=None)
@given(st.floats(min_value=-700, max_value=-1e-300))
def test_log_one_minus_exp_is_exact_at_both_ends(logp: float) -> None:
    exact = math.log(-math.expm1(logp)) if logp > -0.5 else math.log1p(-math.exp(logp))
    assert log_one_minus_exp(torch.tensor([logp], dtype=torch.float64)).item() == pytest.approx(exact, rel=1e-12)


def test_every_registered_algorithm_loads() -> None:
    for name in ALGORITHMS:
        assert callable(load_algorithm(ALGORITHMS[name]))


def test_unknown_algorithm_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"no algorithm 'ppo'.*dppo-binary-tv"):
        LossOptions(algorithm="ppo")
