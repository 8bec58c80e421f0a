"""Every algorithm against the independent oracle, and against finite differences where its loss has a true gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from learner.losses.aggregation import sequence_weights
from learner.losses.batch_statistics import merge_statistics
from learner.losses.form import (
    Candidates,
    TokenBatch,
    TokenTerms,
    load_algorithm,
    load_measure,
    token_losses,
    token_values,
)
from leeway.config.algorithms import ALGORITHMS, INFINITY, LossParameters, Penalties
from tests.unit.learner.losses import oracle
from tests.unit.learner.losses.oracle import Numbers, Token

RELATIVE = 1e-10


def batch_of(tokens: Sequence[Token]) -> TokenBatch:
    """The torch form of the oracle's tokens, in float64."""

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    ids = [sorted(token.mu_candidates, key=lambda i, t=token: -t.mu_candidates[i]) for token in tokens]
    return TokenBatch(
        policy_logprobs=column([token.log_pi for token in tokens]).requires_grad_(),
        behavior_logprobs=column([token.log_mu for token in tokens]),
        advantages=column([token.advantage for token in tokens]),
        loss_mask=torch.ones(len(tokens), dtype=torch.bool),
        sequence_ids=torch.tensor([token.sequence for token in tokens]),
        candidates=Candidates(
            torch.tensor(
                [[t.mu_candidates[i] for i in row] for t, row in zip(tokens, ids, strict=True)], dtype=torch.float64
            ),
            torch.tensor(
                [[t.pi_candidates[i] for i in row] for t, row in zip(tokens, ids, strict=True)], dtype=torch.float64
            ),
            torch.tensor(
                [[i != t.token_id for i in row] for t, row in zip(tokens, ids, strict=True)], dtype=torch.bool
            ),
        ),
        staleness=torch.tensor([token.staleness for token in tokens]),
        proximal_logprobs=column([token.log_proximal for token in tokens]),
    )


def parameters_of(numbers: Numbers) -> LossParameters:
    return LossParameters(
        delta_low=numbers.low,
        delta_high=numbers.high,
        truncation=numbers.truncation,
        ratio_low=numbers.alpha,
        ratio_high=numbers.beta,
        divergence=numbers.divergence,  # pyright: ignore[reportArgumentType]
        delta_growth=numbers.growth,
        delta_growth_limit=numbers.growth_limit,
        mismatch=numbers.mismatch,
        mismatch_allowance=numbers.allowance,
    )


def computed(
    name: str, batch: TokenBatch, parameters: LossParameters, penalties: Penalties | None = None
) -> tuple[Tensor, TokenTerms, Tensor]:
    """Losses, terms and d sum(loss) / d log pi, measuring first where the algorithm is batch-aware."""
    algorithm = ALGORITHMS[name]
    measure = load_measure(algorithm)
    if measure is not None:
        num_sequences = int(batch.sequence_ids.max()) + 1
        batch = replace(batch, statistics=merge_statistics([measure(token_values(batch), parameters, num_sequences)]))
    losses, terms = token_losses(batch, load_algorithm(algorithm), parameters, penalties or Penalties())
    (gradient,) = torch.autograd.grad(losses.sum(), batch.policy_logprobs)
    return losses.detach(), terms, gradient


def assert_agrees(name: str, tokens: Sequence[Token], numbers: Numbers) -> None:
    expected = oracle.answers(name, tokens, numbers)
    losses, terms, gradient = computed(name, batch_of(tokens), parameters_of(numbers))
    clear = np.array([answer.margin > 1e-11 for answer in expected])  # a tie's side is rounding; ties have their tests
    assert clear.mean() > 0.92
    for what, ours, theirs in (
        ("kept", terms.kept, [answer.kept for answer in expected]),
        ("weight", terms.weight, [answer.weight for answer in expected]),
        ("gradient", gradient, [answer.gradient for answer in expected]),
        ("loss", losses, [answer.loss for answer in expected]),
    ):
        np.testing.assert_allclose(
            ours.double().numpy()[clear], np.array(theirs, dtype=np.float64)[clear], rtol=RELATIVE, err_msg=what
        )
    if expected[0].divergence is not None:
        assert terms.divergence is not None
        # 1 - sum is known to rounding only: where little is left under pi, its logarithm is not comparable.
        reads_topk = ALGORITHMS[name].reads_topk(parameters_of(numbers))
        known = np.array([not reads_topk or oracle.buckets(token)[-1][1] > 1e-5 for token in tokens])
        np.testing.assert_allclose(
            terms.divergence.numpy()[known],
            np.array([answer.divergence for answer in expected])[known],
            rtol=RELATIVE,
            atol=1e-14,
        )


def random_tokens(seed: int, count: int, vocabulary: int = 12, k: int = 4) -> list[Token]:
    """Tokens of whole distributions, so that candidates, the sampled token and the rest belong together."""
    rng = np.random.default_rng(seed)
    tokens: list[Token] = []
    sequence = 0
    for index in range(count):
        if index and rng.random() < 0.25:
            sequence += 1
        concentration = 10.0 ** rng.uniform(-1.5, 1)
        mu = np.maximum(rng.dirichlet(np.full(vocabulary, concentration)), 1e-30)
        drift = rng.choice([1e-6, 1e-2, 0.3, 2.0, 6.0])
        pi = mu * np.exp(rng.normal(size=vocabulary) * drift)
        proximal = mu * np.exp(rng.normal(size=vocabulary) * 0.2)
        log_mu, log_pi, log_proximal = (np.log(p / p.sum()) for p in (mu, pi, proximal))
        sampled = int(rng.integers(vocabulary))
        likeliest = np.argsort(-log_mu)[:k].tolist()
        tokens.append(
            Token(
                log_mu=float(log_mu[sampled]),
                log_pi=float(log_pi[sampled]),
                advantage=float(rng.choice([rng.normal(), 0.0, 1.0, -1.0])),
                sequence=sequence,
                token_id=sampled,
                mu_candidates={i: float(log_mu[i]) for i in likeliest},
                pi_candidates={i: float(log_pi[i]) for i in likeliest},
                log_proximal=float(log_proximal[sampled]),
                staleness=int(rng.integers(0, 6)),
            )
        )
    return tokens


def adversarial_tokens() -> list[Token]:
    """Ratios from 1e-8 to 1e8, probabilities next to 0 and to 1, each with every sign of the advantage."""
    logs = [math.log(p) for p in (1e-30, 1e-12, 1e-8, 1e-4, 0.3, 0.7)]
    logs += [math.log1p(-q) for q in (1e-4, 1e-9, 1e-15)]
    pairs = [(mu, pi) for mu in logs for pi in logs if abs(pi - mu) <= math.log(1e8) + 1e-9]
    rng = np.random.default_rng(3)
    tokens: list[Token] = []
    for index, (mu, pi) in enumerate(pairs):
        for advantage in (2.5, 0.0, -0.7):
            # What the sampled token leaves is shared among candidates and the rest.
            rests = [-math.expm1(mu), -math.expm1(pi)]
            shares = rng.dirichlet(np.ones(5))
            tokens.append(
                Token(
                    log_mu=mu,
                    log_pi=pi,
                    advantage=advantage,
                    sequence=index,  # a sequence of one token has three of them here, one per advantage
                    token_id=int(rng.integers(3)),
                    mu_candidates={i: math.log(rests[0] * shares[i - 2]) for i in (3, 4, 5)},
                    pi_candidates={i: math.log(rests[1] * shares[i - 1]) for i in (3, 4, 5)},
                    log_proximal=mu + float(rng.choice([-1.0, 0.0, 0.1, 5.0]) if mu < -6 else 0.0),
                    staleness=index % 4,
                )
            )
    return tokens


NUMBERS = [
    Numbers(),
    Numbers(low=0.05, high=0.1, truncation=5.0, divergence="topk-tv"),
    Numbers(low=0.01, high=0.02, truncation=0.5, alpha=0.9, beta=1.1, divergence="topk-kl"),
    Numbers(low=0.1, high=0.05, truncation=3.0, growth=0.3, mismatch=0.01, allowance=1.5, divergence="binary-tv"),
    Numbers(low=0.2, high=0.3, growth=-0.4, growth_limit=3.0),
]


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_random_tokens(name: str, numbers: Numbers) -> None:
    if name == "predictive-mask" and not numbers.divergence.startswith("topk"):
        numbers = replace(numbers, divergence="topk-tv")
    if name in ("drpo",):
        numbers = replace(numbers, truncation=INFINITY)  # its loss has another value otherwise, see below
    assert_agrees(name, random_tokens(len(name), 150), numbers)


@pytest.mark.parametrize("numbers", NUMBERS[:2])
@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_adversarial_tokens(name: str, numbers: Numbers) -> None:
    if name == "drpo":
        numbers = replace(numbers, truncation=INFINITY)
    assert_agrees(name, adversarial_tokens(), numbers)


@pytest.mark.parametrize("k", [1, 2, 11, 12])
@pytest.mark.parametrize("name", ["dppo-topk-tv", "dppo-topk-kl", "predictive-mask"])
def test_from_one_candidate_to_the_whole_vocabulary(name: str, k: int) -> None:
    assert_agrees(name, random_tokens(k, 60, k=k), Numbers(divergence="topk-kl"))


def test_drpo_with_a_truncation_reports_the_gradient_form() -> None:
    tokens = random_tokens(1, 50)
    numbers = Numbers(truncation=2.0)
    losses, terms, gradient = computed("drpo", batch_of(tokens), parameters_of(numbers))
    expected = oracle.answers("drpo", tokens, numbers)
    np.testing.assert_allclose(gradient, [answer.gradient for answer in expected], rtol=RELATIVE)
    np.testing.assert_allclose(
        losses, [a.gradient * t.log_pi for a, t in zip(expected, tokens, strict=True)], rtol=1e-9
    )
    assert terms.kept.all()


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "fixed-horizon"])
@pytest.mark.parametrize("lengths", [[3, 2, 4, 1], [1, 1, 1], [10]])
def test_aggregation(aggregation: str, lengths: list[int]) -> None:
    losses = np.random.default_rng(0).normal(size=sum(lengths))
    horizon = 7 if aggregation == "fixed-horizon" else None
    weights = sequence_weights(aggregation, np.array(lengths), horizon)  # pyright: ignore[reportArgumentType]
    ours = float((np.repeat(weights, lengths) * losses).sum())
    assert ours == pytest.approx(oracle.aggregated(losses, lengths, aggregation, 7), rel=RELATIVE)


# Ties at exactly representable boundaries: every comparison is strict, but the minimal mask's and icepop's ends.


def token(mu: float, pi: float, advantage: float, **more: float) -> Token:
    return Token(math.log(mu), math.log(pi), advantage, **more)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("name", "tie", "numbers", "kept", "nudged"),
    [
        ("dppo-binary-tv", token(0.25, 0.5, 1), Numbers(low=0.25, high=0.25), True, token(0.25, 0.50001, 1)),
        ("dppo-binary-tv", token(0.5, 0.25, -1), Numbers(low=0.25, high=0.25), True, token(0.5, 0.24999, -1)),
        ("grpo", token(0.25, 0.5, 1), Numbers(low=0.5, high=1.0), True, token(0.25, 0.50001, 1)),
        ("grpo", token(0.5, 0.25, -1), Numbers(low=0.5, high=1.0), True, token(0.5, 0.24999, -1)),
        ("minimal-mask", token(0.75, 0.25, -1), Numbers(low=0.5), False, token(0.75, 0.25001, -1)),
        ("icepop", token(0.5, 0.25, 1), Numbers(alpha=0.5, beta=2.0), True, token(0.5, 0.24999, 1)),
        ("icepop", token(0.25, 0.5, -1), Numbers(alpha=0.5, beta=2.0), True, token(0.25, 0.50001, -1)),
        (
            "trm",
            token(0.25, 0.5, 1),
            Numbers(low=0.25, high=0.25, divergence="binary-tv"),
            True,
            token(0.25, 0.50001, 1),
        ),
        (
            "minirl",
            replace(token(0.3, 0.5, 1), log_proximal=math.log(0.25)),
            Numbers(high=1.0),
            True,
            replace(token(0.3, 0.50001, 1), log_proximal=math.log(0.25)),
        ),
        (
            "decoupled-ppo",
            replace(token(0.3, 0.25, -1), log_proximal=math.log(0.5)),
            Numbers(low=0.5),
            True,
            replace(token(0.3, 0.24999, -1), log_proximal=math.log(0.5)),
        ),
        (
            "dppo-topk-tv",
            replace(
                token(0.25, 0.5, 1),
                token_id=9,
                mu_candidates={1: math.log(0.5)},
                pi_candidates={1: math.log(0.25)},
            ),
            Numbers(high=0.25),
            True,
            replace(
                token(0.25, 0.50001, 1),
                token_id=9,
                mu_candidates={1: math.log(0.5)},
                pi_candidates={1: math.log(0.25)},
            ),
        ),
        (
            "dppo-binary-tv",
            replace(token(0.25, 0.75, 1), staleness=4),
            Numbers(high=0.25, growth=0.25),
            True,
            replace(token(0.25, 0.75, 1), staleness=3),
        ),
    ],
)
def test_a_tie(name: str, tie: Token, numbers: Numbers, kept: bool, nudged: Token) -> None:
    for given, expected in ((tie, kept), (nudged, not kept)):
        assert oracle.answers(name, [given], numbers)[0].kept == expected
        assert computed(name, batch_of([given]), parameters_of(numbers))[1].kept.tolist() == [expected]


# Worked numbers.

SIX = [0.5, 0.25, 0.12, 0.08, 0.04, 0.01], [0.4, 0.25, 0.05, 0.1, 0.1, 0.1]


def six(sampled: int, advantage: float = -1.0) -> Token:
    mu, pi = SIX
    return Token(
        math.log(mu[sampled]),
        math.log(pi[sampled]),
        advantage,
        token_id=sampled,
        mu_candidates={i: math.log(mu[i]) for i in (0, 1)},
        pi_candidates={i: math.log(pi[i]) for i in (0, 1)},
    )


@pytest.mark.parametrize(
    ("sampled", "tv", "kl"), [(0, 0.1, 0.0274537165), (2, 0.17, 0.107915781), (5, 0.1, 0.07874864604)]
)
def test_worked_topk(sampled: int, tv: float, kl: float) -> None:
    batch = batch_of([six(sampled)])
    assert_divergence("dppo-topk-tv", batch, tv)
    assert_divergence("dppo-topk-kl", batch, kl)
    # Without the union, the sampled token would be lost or would push a candidate out.
    assert batch.candidates is not None
    assert batch.candidates.valid.sum() == (1 if sampled < 2 else 2)


def assert_divergence(name: str, batch: TokenBatch, expected: float) -> None:
    divergence = computed(name, batch, ALGORITHMS[name].defaults)[1].divergence
    assert divergence is not None
    assert divergence.item() == pytest.approx(expected, rel=5e-9)


@pytest.mark.parametrize(
    ("name", "given", "weight", "loss"),
    [
        ("drpo", token(0.5, 0.6, 1), 0.6, -1.15),
        ("minirl", replace(token(0.1, 0.5, 1), log_proximal=math.log(0.4)), 5.0, -5 * math.log(0.5)),
        ("minirl-tis", replace(token(0.1, 0.5, 1), log_proximal=math.log(0.4)), 3.0, -3 * math.log(0.5)),
        ("minirl", replace(token(0.1, 0.52, 1), log_proximal=math.log(0.4)), 0.0, 0.0),
        ("minimal-mask", token(0.75, 0.25, 1), 1 / 3, -math.log(0.25) / 3),
        ("decoupled-ppo", replace(token(0.1, 0.44, 1), log_proximal=math.log(0.4)), 4.4, -4.4),
        ("decoupled-ppo", replace(token(0.1, 0.6, 1), log_proximal=math.log(0.4)), 0.0, -4.8),
        ("icepop", token(0.5, 0.2, 1), 0.0, 0.0),
        ("icepop", token(0.1, 0.5, 1), 5.0, -5 * math.log(0.5)),
        ("predictive-mask", six(2, advantage=1.0), 5 / 12, -5 / 12 * math.log(0.05)),
    ],
)
def test_worked_weights(name: str, given: Token, weight: float, loss: float) -> None:
    """The docstrings' examples, with the algorithms' own numbers."""
    losses, terms, gradient = computed(name, batch_of([given]), ALGORITHMS[name].defaults)
    assert terms.weight.item() == pytest.approx(weight, rel=1e-12)
    assert losses.item() == pytest.approx(loss, rel=1e-12)
    assert gradient.item() == pytest.approx(-given.advantage * weight, rel=1e-12)


def test_the_predictive_mask_can_disagree_with_the_ratio() -> None:
    """r < 1 with A < 0 outside, yet pushing the token further down leads back: DPPO masks it, this does not."""
    mu = {0: 0.5, 1: 0.3, 2: 0.1}
    pi = {0: 0.85, 1: 0.02, 2: 0.098}
    given = Token(
        math.log(mu[2]),
        math.log(pi[2]),
        -1.0,
        token_id=2,
        mu_candidates={i: math.log(mu[i]) for i in (0, 1)},
        pi_candidates={i: math.log(pi[i]) for i in (0, 1)},
    )
    numbers = Numbers(low=0.1, high=0.1, divergence="topk-tv")
    assert oracle.answers("dppo-topk-tv", [given], numbers)[0].kept is False
    ours = computed("predictive-mask", batch_of([given]), parameters_of(numbers))[1].kept.item()
    assert ours == oracle.answers("predictive-mask", [given], numbers)[0].kept


def test_one_token_too_far_drops_its_whole_sequence() -> None:
    near, far = token(0.5, 0.5, -1), token(0.99, 0.8, -1)
    alone = replace(near, sequence=1)
    kept = computed("trm", batch_of([near, far, alone]), ALGORITHMS["trm"].defaults)[1].kept
    assert kept.tolist() == [False, False, True]


def test_statistics_do_not_depend_on_the_cut_into_micro_batches() -> None:
    tokens = random_tokens(9, 60)
    algorithm, parameters = ALGORITHMS["trm"], ALGORITHMS["trm"].defaults
    measure = load_measure(algorithm)
    assert measure is not None
    count = tokens[-1].sequence + 1
    whole = measure(token_values(batch_of(tokens)), parameters, count)
    parts = [measure(token_values(batch_of(tokens[at : at + 7])), parameters, count) for at in range(0, 60, 7)]
    assert torch.equal(merge_statistics(parts).maxima["excess"], whole.maxima["excess"])


# Gradients are true ones where the source's loss is differentiable.


def finite_difference(value: Callable[[float], float], at: float, step: float = 1e-5) -> float:
    """Fourth order: error of step^4."""
    pair = (value(at + step) - value(at - step)) / (2 * step)
    wide = (value(at + 2 * step) - value(at - 2 * step)) / (4 * step)
    return (4 * pair - wide) / 3


def surrogate(name: str, given: Token, numbers: Numbers) -> Callable[[float], float]:
    """The differentiable loss of log pi behind a gradient form, its mask held fixed."""
    kept = oracle.answers(name, [given], numbers)[0].kept
    if name in ("drpo", "decoupled-ppo"):
        return lambda log_pi: oracle.answers(name, [replace(given, log_pi=log_pi)], numbers)[0].loss
    return lambda log_pi: -given.advantage * math.exp(log_pi - given.log_mu) * kept


@pytest.mark.parametrize("name", [n for n, a in ALGORITHMS.items() if not a.batch_aware])
def test_finite_differences(name: str) -> None:
    """With C infinite, -A sg(M r) log pi has the gradient of -A M r."""
    numbers = Numbers(low=0.1, high=0.15, divergence="topk-tv")
    tokens = [
        given
        for given in random_tokens(7, 80)
        if oracle.answers(name, [given], numbers)[0].margin > 1e-3 and -20 < given.log_pi < -1e-3
    ]
    assert len(tokens) > 20
    gradient = computed(name, batch_of(tokens), parameters_of(numbers))[2]
    expected = [finite_difference(surrogate(name, given, numbers), given.log_pi) for given in tokens]
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("penalties", "value", "slope"),
    [
        (Penalties(quadratic=1e-3), 1e-3 * math.log(1.5) ** 2, 2e-3 * math.log(1.5)),
        (Penalties(reference_kl=0.1), 0.05 * math.log(3) ** 2, 0.1 * math.log(3)),
        (Penalties(reference_kl=0.1, reference_kl_estimator="k3"), 0.1 * (1 / 3 - 1 + math.log(3)), 0.1 * (1 - 1 / 3)),
        (Penalties(entropy=0.01), -0.01 * 1.3, 0.0),
    ],
)
def test_penalties(penalties: Penalties, value: float, slope: float) -> None:
    """mu = .5, pi = .75, reference .25; masked and without advantage: the penalties act all the same."""
    for advantage in (0.0, 1.0):
        batch = replace(
            batch_of([token(0.5, 0.75, advantage)]),
            reference_logprobs=torch.tensor([math.log(0.25)], dtype=torch.float64),
            entropies=torch.tensor([1.3], dtype=torch.float64),
        )
        losses, terms, gradient = computed("dppo-binary-tv", batch, LossParameters(0.1, 0.1, 5.0), penalties)
        assert terms.kept.item() == (advantage == 0)
        assert losses.item() == pytest.approx(value, rel=1e-12)
        assert gradient.item() == pytest.approx(slope, rel=1e-12, abs=1e-15)


def test_the_entropy_bonus_has_a_gradient_of_minus_its_coefficient() -> None:
    entropies = torch.tensor([1.3, 0.2], dtype=torch.float64, requires_grad=True)
    batch = replace(
        batch_of([token(0.5, 0.5, 1), token(0.5, 0.5, 1)]),
        entropies=entropies,
        loss_mask=torch.tensor([True, False]),
    )
    losses, _ = token_losses(
        batch, load_algorithm(ALGORITHMS["pg-is"]), ALGORITHMS["pg-is"].defaults, Penalties(entropy=0.01)
    )
    assert torch.autograd.grad(losses.sum(), entropies)[0].tolist() == [-0.01, 0.0]
