"""The trainer's loss with all that algorithms ask for: candidates, staleness, older policies, statistics first."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from learner.batch.packing import pack
from learner.lineage import trajectory_staleness
from learner.losses.batch_statistics import Reduction
from learner.policy.model import PolicyModel
from learner.training.policy_loss import PolicyLoss, RunningMismatch
from leeway.config import TrainingOptions
from leeway.config.algorithms import ALGORITHMS
from leeway.types import PolicyVersion, Trajectory, TrajectoryGroup, VersionSpan
from tests.harness.learner_builders import (
    VOCABULARY,
    assert_refused,
    assert_resumes,
    dense_model,
    gradients,
    groups,
    trainer,
)
from tests.unit.learner.losses import oracle
from tests.unit.learner.losses.oracle import Numbers, Token

RECORDED = 4


def options(**changes: Any) -> TrainingOptions:
    values = {"learning_rate": 1e-2, "max_gradient_norm": math.inf, "publish_dtype": "float32", "topk": 3, **changes}
    return TrainingOptions.model_validate(values)


def recorded(t: Trajectory, step: int = 0, seed: int = 0) -> Trajectory:
    """With a whole random distribution behind every token: its top 4, in no order, and a version."""
    rng = np.random.default_rng([seed, *t.trajectory_id.encode()])
    logits = rng.normal(size=(t.num_tokens, VOCABULARY)) * 2
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ids = np.argsort(-logits, axis=-1)[:, :RECORDED]
    ids = np.take_along_axis(ids, rng.permuted(np.tile(np.arange(RECORDED), (t.num_tokens, 1)), axis=1), axis=-1)
    mask = t.loss_mask
    start = int(np.flatnonzero(mask)[0])
    return replace(
        t,
        behavior_logprobs=np.where(mask, logprobs[np.arange(t.num_tokens), t.token_ids], 0).astype(np.float32),
        topk_token_ids=np.where(mask[:, None], ids, 0).astype(np.int32),
        topk_logprobs=np.where(mask[:, None], np.take_along_axis(logprobs, ids, -1), 0).astype(np.float32),
        version_spans=(VersionSpan(start, t.num_tokens, PolicyVersion("run", 1, step, b"")),),
    )


def recorded_groups(seed: int = 0, step: int = 0) -> list[TrajectoryGroup]:
    return [
        replace(group, trajectories=tuple(recorded(t, step, seed) for t in group.trajectories))
        for group in groups(seed=seed)
    ]


def policy_distribution(model: PreTrainedModel, t: Trajectory) -> Tensor:
    """[n, V] log-probs of each token's place, the first row meaningless."""
    ids = torch.tensor(t.token_ids.astype(np.int64))
    return torch.log_softmax(model(input_ids=ids[None], use_cache=False).logits[0].float(), -1).roll(1, 0)


def reference_gradients(
    model: PreTrainedModel, step: list[TrajectoryGroup], name: str, numbers: Numbers, topk: int
) -> dict[str, Tensor]:
    """The oracle's coefficients times the gradient of log pi, each trajectory alone."""
    tokens: list[Token] = []
    log_pis: list[Tensor] = []
    trajectories = [t for group in step for t in group.trajectories]
    for group in step:
        mean = sum(t.reward for t in group.trajectories) / len(group.trajectories)
        for t in group.trajectories:
            sequence = trajectories.index(t)
            law = policy_distribution(model, t)
            assert t.topk_token_ids is not None
            assert t.topk_logprobs is not None
            for i in np.flatnonzero(t.loss_mask).tolist():
                likeliest = sorted(zip(t.topk_token_ids[i], t.topk_logprobs[i], strict=True), key=lambda c: -c[1])
                mu_candidates = {int(token): float(logprob) for token, logprob in likeliest[:topk]}
                log_pi = law[i, int(t.token_ids[i])]
                log_pis.append(log_pi)
                tokens.append(
                    Token(
                        log_mu=float(t.behavior_logprobs[i]),
                        log_pi=log_pi.item(),
                        advantage=t.reward - mean,
                        sequence=sequence,
                        token_id=int(t.token_ids[i]),
                        mu_candidates=mu_candidates,
                        pi_candidates={token: law[i, token].item() for token in mu_candidates},
                        log_proximal=log_pi.item(),
                    )
                )
    answers = oracle.answers(name, tokens, numbers)
    assert len({answer.kept for answer in answers}) == 2 or name in ("drpo", "minirl", "decoupled-ppo", "pg-is")
    total = sum(
        (answer.gradient * log_pi for answer, log_pi in zip(answers, log_pis, strict=True)), torch.zeros(())
    ) / len(trajectories)
    total.backward()
    return gradients(model)


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("dppo-topk-tv", Numbers(low=0.3, high=0.3)),
        ("dppo-topk-kl", Numbers(low=0.8, high=0.8)),
        ("predictive-mask", Numbers(low=0.3, high=0.3, divergence="topk-tv")),
        ("trm", Numbers(low=0.4, high=0.4, divergence="binary-kl")),
        ("icepop", Numbers(alpha=0.5, beta=5.0)),
        ("drpo", Numbers(low=0.4, high=0.4)),
        ("minimal-mask", Numbers(low=0.05, high=0.05)),
        ("decoupled-ppo", Numbers()),
    ],
)
@pytest.mark.parametrize("micro_batch_tokens", [100_000, 1])
def test_the_step_is_the_oracle(name: str, numbers: Numbers, micro_batch_tokens: int) -> None:
    step = recorded_groups()
    model = dense_model()
    chosen = options(
        algorithm=name,
        delta_low=numbers.low,
        delta_high=numbers.high,
        truncation=math.inf,
        micro_batch_tokens=micro_batch_tokens,
    )
    trainer(model, chosen).train_step(1, step)
    expected = reference_gradients(dense_model(), step, name, numbers, 3)
    for key, gradient in gradients(model).items():
        assert (gradient - expected[key]).norm() <= 1e-4 * expected[key].norm(), key


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_every_algorithm_trains(name: str) -> None:
    taught = trainer(dense_model(), options(algorithm=name))
    for number in (1, 2):
        statistics = taught.train_step(number, recorded_groups(number)).statistics
        assert all(math.isfinite(value) for value in statistics.values())


def test_candidates_are_scored_and_packed_in_order() -> None:
    t = recorded(groups()[0].trajectories[0])
    batch = pack([[0]], [t], topk=2)
    assert batch.topk_token_ids is not None
    assert batch.topk_behavior_logprobs is not None
    assert (np.diff(batch.topk_behavior_logprobs, axis=-1) < 0).all()
    assert t.topk_logprobs is not None
    np.testing.assert_array_equal(batch.topk_behavior_logprobs[:, 0], t.topk_logprobs[t.loss_mask].max(-1))
    model = dense_model()
    policy = PolicyModel(model, routing_replay=False, gradient_checkpointing=False)
    with policy.scored(batch) as scores:
        assert scores.topk_logprobs is not None
        assert not scores.topk_logprobs.requires_grad
        expected = policy_distribution(model, t)[torch.tensor(t.loss_mask)].gather(
            -1, torch.tensor(batch.topk_token_ids)
        )
        torch.testing.assert_close(scores.topk_logprobs, expected, rtol=1e-5, atol=1e-5)


# Bad input.


def spoiled(t: Trajectory, **columns: Any) -> Trajectory:
    return replace(t, **columns)


def with_entry(column: np.ndarray | None, value: float) -> np.ndarray:
    assert column is not None
    changed = column.copy()
    changed[-1, 0] = value
    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: spoiled(t, topk_token_ids=None, topk_logprobs=None),
            r"no recorded candidates; set sampling\.topk = 3",
        ),
        (lambda t: spoiled(t, topk_logprobs=t.topk_logprobs[:-1]), "candidates have shapes"),
        (
            lambda t: spoiled(t, topk_token_ids=t.topk_token_ids[:, :2], topk_logprobs=t.topk_logprobs[:, :2]),
            r"has 2 recorded candidates per token where the loss takes 3; set sampling\.topk = 3",
        ),
        (lambda t: spoiled(t, topk_logprobs=with_entry(t.topk_logprobs, math.nan)), "log-prob is not a finite"),
        (lambda t: spoiled(t, topk_logprobs=with_entry(t.topk_logprobs, -math.inf)), "log-prob is not a finite"),
        (lambda t: spoiled(t, topk_logprobs=with_entry(t.topk_logprobs, -1e-6)), "more than all probability"),
        (lambda t: spoiled(t, topk_token_ids=with_entry(t.topk_token_ids, VOCABULARY)), "outside the vocabulary"),
        (
            lambda t: spoiled(t, topk_token_ids=with_entry(t.topk_token_ids, t.topk_token_ids[-1, 1])),
            "same candidate twice",
        ),
    ],
)
def test_unusable_candidates_are_refused_before_anything_moves(
    change: Callable[[Any], Trajectory], message: str
) -> None:
    step = recorded_groups()
    members = step[1].trajectories
    bad = replace(step[1], trajectories=(*members[:2], change(members[2]), *members[3:]))
    assert_refused(dense_model, options(algorithm="dppo-topk-tv"), [step[0], bad, step[2]], step, message)


def test_which_losses_need_recorded_candidates() -> None:
    for algorithm in ("dppo-topk-tv", "dppo-topk-kl", "predictive-mask"):
        assert options(algorithm=algorithm).topk_needed == 3
    assert TrainingOptions(algorithm="trm", divergence="topk-kl").topk_needed == 20
    assert options(algorithm="dppo-topk-tv", topk=2).topk_needed == 2
    assert TrainingOptions(algorithm="trm").topk_needed == 0


# Staleness.


def test_staleness_of_tokens_follows_the_surviving_history() -> None:
    t = replace(
        groups()[0].trajectories[0],
        version_spans=(
            VersionSpan(3, 4, PolicyVersion("run", 1, 7, b"")),  # epoch 1 was abandoned at step 4
            VersionSpan(4, 5, PolicyVersion("run", 2, 6, b"")),
        ),
    )
    staleness = trajectory_staleness(t, 8, ((1, 0), (2, 4)))
    assert staleness.tolist()[:6] == [0, 0, 0, 4, 2, 0][: t.num_tokens]


def test_staleness_reaches_the_loss() -> None:
    """With delta growing by staleness fewer tokens are masked; on fresh tokens nothing changes."""

    def masked(number: int, **changes: Any) -> float:
        taught = trainer(dense_model(), options(delta_low=0.01, delta_high=0.01, **changes))
        return taught.train_step(number, recorded_groups(step=0)).statistics["masked_fraction"]

    plain, growing = {}, {"delta_growth": 1.0, "delta_growth_limit": 100.0}
    assert masked(1, **growing) == masked(1, **plain) > 0
    assert masked(9, **growing) < masked(9, **plain)
    assert masked(9, delta_growth=-1.0, delta_growth_limit=1000.0) > masked(9, **plain)


def test_mismatch_is_learned_from_fresh_tokens_only() -> None:
    taught = trainer(dense_model(), options(mismatch_memory_steps=2))
    stale = taught.train_step(5, recorded_groups(step=0)).statistics
    assert "mismatch" not in stale
    fresh = recorded_groups(step=5)
    statistics = taught.train_step(6, fresh).statistics
    assert statistics["mismatch"] == pytest.approx(statistics["mean_abs_policy_behavior_difference"], rel=1e-6)
    assert taught.train_step(9, recorded_groups(step=5)).statistics["mismatch"] == statistics["mismatch"]


def test_mismatch_widens_the_threshold_of_later_steps() -> None:
    def masked(**changes: Any) -> list[float]:
        taught = trainer(dense_model(), options(delta_low=0.01, delta_high=0.01, learning_rate=1e-9, **changes))
        step = recorded_groups(step=0)
        return [taught.train_step(1, step).statistics["masked_fraction"] for _ in range(2)]

    first, second = masked(mismatch_allowance=3.0)
    assert first == masked()[0] == masked()[1]  # not known yet; without allowance never used
    assert second < first


def test_running_mismatch() -> None:
    running = RunningMismatch().after(1.0, 10.0, 2).after(0.0, 0.0, 2).after(4.0, 10.0, 2)
    assert running.mean == pytest.approx(0.3)
    assert RunningMismatch().mean == 0


def test_what_is_measured_is_reduced_over_ranks() -> None:
    """Two ranks with the same tokens: sums double, maxima stay; and each quantity says how it is reduced."""
    seen: list[Reduction] = []

    def twice(tensor: Tensor, reduction: Reduction) -> Tensor:
        seen.append(reduction)
        return tensor * 2 if reduction == "sum" else tensor

    chosen = options(algorithm="trm")
    taught, alone = trainer(dense_model(), chosen), trainer(dense_model(), chosen)
    taught._loss = taught._gradient._loss = PolicyLoss(chosen, twice)
    assert taught.train_step(1, recorded_groups()).statistics == alone.train_step(1, recorded_groups()).statistics
    assert seen == ["max"]
    mismatches = [
        PolicyLoss(chosen).observed({"fresh_divergence": ranks * 0.5, "fresh_tokens": ranks * 10.0}) for ranks in (1, 2)
    ]
    assert mismatches == [{"mismatch": 0.05}] * 2


# Older policies.


def test_the_reference_is_the_initial_model_and_its_penalty_pulls_back() -> None:
    coefficient = 5.0
    model = dense_model()
    taught = trainer(model, options(reference_kl_coefficient=coefficient, learning_rate=1e-2))
    taught.train_step(1, recorded_groups(1))  # now the model has moved
    moved = dense_model()
    moved.load_state_dict(model.state_dict())
    step = recorded_groups(2)
    taught.train_step(2, step)
    initial, total = dense_model(), torch.zeros(())
    trajectories = [t for group in step for t in group.trajectories]
    plain = dense_model()
    plain.load_state_dict(moved.state_dict())
    without = trainer(plain, options())
    without.train_step(2, step)
    for t in trajectories:
        places, ids = torch.tensor(np.flatnonzero(t.loss_mask)), torch.tensor(t.token_ids[t.loss_mask].astype(np.int64))
        log_pi = policy_distribution(moved, t)[places, ids]
        log_ref = policy_distribution(initial, t)[places, ids].detach()
        total = total + ((log_pi - log_ref).square() / 2).sum() * coefficient / len(trajectories)
    total.backward()
    for name, parameter in moved.named_parameters():
        assert parameter.grad is not None
        expected = parameter.grad + gradients(plain)[name]
        torch.testing.assert_close(gradients(model)[name], expected, rtol=1e-3, atol=1e-4)


def test_the_entropy_bonus_spreads_the_policy() -> None:
    """On groups without signal, only the bonus moves the weights."""

    def entropies(coefficient: float) -> list[float]:
        taught = trainer(dense_model(), options(entropy_coefficient=coefficient))
        step = recorded_groups()[2:]
        return [taught.train_step(number, step).statistics["entropy"] for number in range(1, 6)]

    up, flat, down = entropies(0.1), entropies(0.0), entropies(-0.1)
    assert up[-1] > up[0]
    assert flat[-1] == flat[0]
    assert down[-1] < down[0]


def test_pi_old_is_the_learner_at_the_start_of_a_batch() -> None:
    """Three steps on the same data: one copy for all three lets minirl's clip act, a copy for each never."""

    def masked(every: int) -> list[float]:
        taught = trainer(dense_model(), options(algorithm="minirl", proximal_every_steps=every, learning_rate=3e-2))
        return [taught.train_step(n, recorded_groups()).statistics["masked_fraction"] for n in range(1, 5)]

    assert masked(1) == [0, 0, 0, 0]
    batch = masked(3)
    assert batch[0] == 0
    assert min(batch[1:3]) > 0
    assert batch[3] == 0


@pytest.mark.parametrize(
    "chosen",
    [
        {"algorithm": "minirl", "proximal_every_steps": 4},
        {"algorithm": "dppo-topk-kl", "mismatch_allowance": 2.0, "delta_growth": 0.5},
        {"algorithm": "trm", "reference_kl_coefficient": 0.1, "entropy_coefficient": 0.01},
        {"algorithm": "decoupled-ppo", "quadratic_coefficient": 1e-3, "baseline": "leave-one-out"},
    ],
)
def test_resuming_gives_the_same_bits(chosen: dict[str, Any], tmp_path: Path) -> None:
    steps = [recorded_groups(seed, step=max(0, seed - 1)) for seed in range(6)]
    assert_resumes(dense_model, options(**chosen), steps, tmp_path)


def test_staleness_stays_with_its_tokens_when_packed() -> None:
    trajectories = [groups()[0].trajectories[i] for i in range(3)]
    staleness = [100 * i + np.arange(t.num_tokens) for i, t in enumerate(trajectories)]
    batch = pack([[2, 0], [1]], trajectories, staleness=staleness)
    expected = np.concatenate([staleness[i][trajectories[i].loss_mask] for i in (2, 0, 1)])
    assert batch.staleness is not None
    np.testing.assert_array_equal(batch.staleness, expected)
