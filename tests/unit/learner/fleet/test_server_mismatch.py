"""Which servers diverge: never a healthy one for being stale, always one whose log-probs are not its label's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from learner.fleet.mismatch import MAX_NATS, MismatchWindow, Sample, Standing, samples_of, standings
from learner.fleet.watch import verdicts
from leeway.config import FleetOptions
from leeway.types import (
    Drain,
    DrainReason,
    Float32Array,
    PolicyVersion,
    ServerStatus,
    Trajectory,
    VersionSpan,
)
from tests.harness import learner_builders

OPTIONS = FleetOptions(min_tokens=500)
VOCABULARY = 32
MOMENT = datetime(2026, 1, 1, tzinfo=UTC)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Fault:
    """What is wrong with a server: how it turns the right logits into those it samples from and those it reports."""

    sampled: Callable[[Floats, np.random.Generator], Floats] = lambda logits, _: logits
    reported: Callable[[Floats, np.random.Generator], Floats] = lambda logprobs, _: logprobs


HEALTHY = Fault()
FAULTS = {
    "noise on mu": Fault(reported=lambda logprobs, random: logprobs + random.normal(0, 1, logprobs.shape)),
    "wrong weights under a right label": Fault(sampled=lambda logits, random: random.normal(0, 2, logits.shape)),
    "half the temperature": Fault(sampled=lambda logits, _: 2 * logits),
    "log-probs without the temperature": Fault(reported=lambda logprobs, _: log_softmax(logprobs * 0.5)),
    "nothing but NaN": Fault(reported=lambda logprobs, _: np.full_like(logprobs, np.nan)),
}


def log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def trajectory(server_id: str, spans: Sequence[VersionSpan], behavior_logprobs: Float32Array) -> Trajectory:
    made = learner_builders.trajectory("t", len(behavior_logprobs), prompt=spans[0].start_token)
    return replace(made, server_id=server_id, behavior_logprobs=behavior_logprobs, version_spans=tuple(spans))


def sampled(
    server_id: str, ages: Sequence[int], fault: Fault, random: np.random.Generator, *, drift: float = 0.3
) -> list[Sample]:
    """Trajectories of one server, each of one age; the policy moves by `drift` nats per step and logit."""
    found: list[Sample] = []
    for age in ages:
        count = int(random.integers(5, 40))
        logits = random.normal(0, 2, (count, VOCABULARY))  # of the version that the label names
        logprobs = log_softmax(fault.sampled(logits, random))
        tokens = np.array([random.choice(VOCABULARY, p=np.exp(row)) for row in logprobs])
        rows = np.arange(count)
        mu = fault.reported(logprobs, random)[rows, tokens] + random.normal(0, 0.02, count)  # the engine's numerics
        pi = log_softmax(logits + drift * age * random.normal(0, 1, logits.shape))[rows, tokens]
        prompt = 3
        behavior = np.concatenate([np.zeros(prompt), mu]).astype(np.float32)
        span = VersionSpan(prompt, prompt + count, PolicyVersion("r", 1, 10 - age, b""))
        found += samples_of(trajectory(server_id, [span], behavior), pi.astype(np.float32), 10, [(1, 0)])
    return found


def flagged(samples: Sequence[Sample], servers: Sequence[str]) -> set[str]:
    statuses = [status(name) for name in servers]
    return {verdict.server_id for verdict in verdicts(standings(samples, OPTIONS.min_tokens), statuses, OPTIONS)}


def status(
    server_id: str, *, drained: bool = False, tickets: int = 0, seconds: float = 0.0, present: bool = True
) -> ServerStatus:
    drain = Drain(DrainReason.OPERATOR, "", MOMENT) if drained else None
    return ServerStatus(server_id, present, drain, None, 0, 0.0, tickets, seconds)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    ages=st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=3), min_size=1, max_size=5),
    drift=st.sampled_from([0.0, 0.1, 0.5, 2.0]),
)
def test_a_healthy_fleet_is_never_flagged_however_stale_its_servers(
    seed: int, ages: list[list[int]], drift: float
) -> None:
    random = np.random.default_rng(seed)
    names = [f"s{number}" for number in range(len(ages))]
    samples = [
        sample
        for name, own in zip(names, ages, strict=True)
        for sample in sampled(name, own * 20, HEALTHY, random, drift=drift)
    ]
    assert flagged(samples, names) == set()


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("others", [0, 1, 3])
def test_a_server_that_is_not_what_its_labels_say_is_flagged_and_nobody_else(fault: str, others: int) -> None:
    random = np.random.default_rng(1)
    names = ["odd", *(f"s{number}" for number in range(others))]
    ages = [0] * 60 + [1] * 30 + [3] * 10
    samples = [
        sample for name in names for sample in sampled(name, ages, FAULTS[fault] if name == "odd" else HEALTHY, random)
    ]
    assert flagged(samples, names) == {"odd"}


def test_one_that_is_always_stale_is_compared_with_equally_stale_tokens() -> None:
    random = np.random.default_rng(2)
    ages = [2] * 100
    others = [*sampled("a", ages, HEALTHY, random), *sampled("b", ages, HEALTHY, random)]
    odd = sampled("odd", ages, FAULTS["wrong weights under a right label"], random)
    assert flagged([*others, *odd], ["a", "b", "odd"]) == {"odd"}
    assert flagged(odd, ["odd"]) == set(), "alone, and never fresh: nothing can be said"


def test_few_tokens_say_nothing() -> None:
    random = np.random.default_rng(3)
    few = sampled("odd", [0] * 3, FAULTS["noise on mu"], random)
    assert sum(sample.num_tokens for sample in few) < OPTIONS.min_tokens
    assert standings(few, OPTIONS.min_tokens) == {}
    (standing,) = standings(sampled("odd", [0] * 100, FAULTS["noise on mu"], random), OPTIONS.min_tokens).values()
    assert standing.excess_nats > 0.5
    assert standing.standard_error < 0.1


def test_tokens_of_two_versions_count_at_their_own_staleness() -> None:
    spans = [VersionSpan(2, 4, PolicyVersion("r", 1, 8, b"")), VersionSpan(4, 7, PolicyVersion("r", 1, 10, b""))]
    behavior = np.array([0, 0, -1, -2, -1, -1, -1], np.float32)
    policy = np.array([-1.5, -2, -1, -np.inf, -1.25], np.float32)
    found = samples_of(trajectory("s", spans, behavior), policy, 10, [(1, 0)])
    assert found == [Sample("s", 0, 3, MAX_NATS + 0.25), Sample("s", 2, 2, 0.5)]
    assert samples_of(trajectory("s", spans, behavior), policy[:-1], 10, [(1, 0)]) == []


def test_what_a_window_forgets() -> None:
    window = MismatchWindow(2)
    fresh = [Sample("a", 0, 10, 20.0), Sample("a", 0, 10, 21.0), Sample("b", 0, 10, 0.0), Sample("b", 0, 10, 0.1)]
    window.add(fresh)
    assert set(window.standings(10)) == {"a", "b"}
    window.forget(["a"])
    assert set(window.standings(10)) == {"b"}
    window.add([])
    window.add([])
    assert window.standings(1) == {}


def test_who_is_drained_already_or_unknown_is_not_judged_and_the_worst_comes_first() -> None:
    standing = {name: Standing(excess, 0.01, 5000) for name, excess in (("a", 0.5), ("b", 3.0), ("c", 0.21), ("d", 9))}
    found = verdicts(standing, [status("a"), status("b"), status("c"), status("d", drained=True)], OPTIONS)
    assert [(verdict.server_id, verdict.reason) for verdict in found] == [
        ("b", DrainReason.DIVERGING),
        ("a", DrainReason.DIVERGING),
    ]
    assert "3 nats per token" in found[0].message
    assert "5000 tokens" in found[0].message


def test_a_slow_server_is_one_that_takes_much_longer_than_the_others() -> None:
    usual = [status("a", tickets=32, seconds=9.0), status("b", tickets=16, seconds=12.0)]
    options = FleetOptions(slow_ratio=10.0, slow_seconds=60.0)

    def slow(server: ServerStatus, options: FleetOptions = options) -> list[tuple[str, DrainReason]]:
        return [(verdict.server_id, verdict.reason) for verdict in verdicts({}, [*usual, server], options)]

    assert slow(status("slow", tickets=16, seconds=91.0)) == [("slow", DrainReason.SLOW)]
    assert slow(status("slow", tickets=16, seconds=89.0)) == []
    assert slow(status("slow", tickets=15, seconds=91.0)) == []
    assert slow(status("gone", tickets=16, seconds=91.0, present=False)) == []
    assert slow(status("slow", tickets=16, seconds=91.0), FleetOptions(slow_ratio=math.inf)) == []
    assert slow(status("slow", tickets=16, seconds=91.0), FleetOptions(slow_ratio=10.0, slow_seconds=92.0)) == []
    assert verdicts({}, [status("only", tickets=32, seconds=1e6)], options) == []
