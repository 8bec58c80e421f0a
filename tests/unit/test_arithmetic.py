"""The arithmetic law is a distribution, depends on the version, and survives publishing."""

import math

import pytest

from leeway import arithmetic
from leeway.arithmetic import ArithmeticWeights
from leeway.errors import PreconditionError
from leeway.types import WeightManifest
from leeway.weights.digests import verify_weights
from tests.harness.arithmetic_law import behavior_logprob, next_token, policy_version

WEIGHTS = ArithmeticWeights.of(policy_version("r", epoch=2, step=7, history=3))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_probabilities_sum_to_one(temperature: float) -> None:
    distribution = arithmetic.next_distribution(WEIGHTS, 5, 9, temperature)
    total = sum(math.exp(distribution.logprob(token)) for token in range(arithmetic.SIGNATURE.vocab_size))
    assert total == pytest.approx(1.0)


def test_samples_follow_the_distribution() -> None:
    distribution = arithmetic.next_distribution(WEIGHTS, 5, 9)
    draws = [arithmetic.sample(distribution, 5, seed) for seed in range(4000)]
    share = sum(token == distribution.favoured for token, _ in draws) / len(draws)
    assert share == pytest.approx(math.exp(distribution.favoured_logprob), abs=0.03)
    assert {token for token, _ in draws} == set(range(arithmetic.SIGNATURE.vocab_size))
    assert all(logprob == distribution.logprob(token) for token, logprob in draws)


def test_every_version_has_its_own_logprob() -> None:
    prefix = [3, 4, 5]
    versions = [policy_version("r", 1, step, history) for history in range(3) for step in range(50)]
    logprobs = [behavior_logprob(ArithmeticWeights.of(version), prefix, 17) for version in versions]
    assert len(set(logprobs)) > 140  # most tokens are not favoured, and each version has its own q


def test_oracle_recomputes_a_sampled_token() -> None:
    token, logprob = next_token(WEIGHTS, [3, 4, 5], seed=11)
    assert behavior_logprob(WEIGHTS, [3, 4, 5], token) == logprob
    assert next_token(WEIGHTS, [3, 4, 5], seed=11) == (token, logprob)


def test_top_tokens_are_the_likeliest() -> None:
    distribution = arithmetic.next_distribution(WEIGHTS, 5, 9)
    for count in (1, 3, 20):
        top = distribution.top(count)
        assert len(set(top)) == count
        assert top[0] == distribution.favoured
        assert max(distribution.logprob(t) for t in set(range(64)) - set(top)) <= distribution.logprob(top[-1])


def test_routing_names_distinct_experts() -> None:
    for position in range(40):
        rows = arithmetic.routing_row(WEIGHTS, position, position % 7)
        assert len(rows) == arithmetic.SIGNATURE.moe_layers
        for row in rows:
            assert len(set(row)) == arithmetic.SIGNATURE.experts_per_token
            assert all(0 <= expert < arithmetic.SIGNATURE.experts for expert in row)


def test_the_law_follows_the_bytes_and_a_label_tells_them() -> None:
    manifest, buffers = arithmetic.published_weights(history=3, step=7)
    verify_weights(manifest, buffers, policy_version("r", 2, 7, history=3).digest)
    assert arithmetic.read_weights(manifest, buffers) == WEIGHTS
    _, others = arithmetic.published_weights(history=4, step=7)
    assert arithmetic.read_weights(manifest, others) != WEIGHTS
    with pytest.raises(PreconditionError, match="do not fit"):
        arithmetic.read_weights(WeightManifest(()), [])


def test_tokenizer_round_trip() -> None:
    tokenizer = arithmetic.ArithmeticTokenizer()
    ids = tokenizer.encode("sort 3 1 2")
    assert tokenizer.decode([*ids, arithmetic.END_OF_SEQUENCE]) == "sort 3 1 2"
    assert tokenizer.encode("") == []
    assert all(0 < token < arithmetic.SIGNATURE.vocab_size for token in tokenizer.encode("a>b\n?"))
