"""Over-long trajectories: masked, dropped or punished as the options say; and computing in bfloat16."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from learner.batch.advantages import OverlongRule, group_advantages, is_overlong, shape_group, soft_penalty
from leeway.config import TrainingOptions
from leeway.types import FinishReason, TrajectoryGroup
from tests.harness.learner_builders import dense_model, groups, moe_model, trainer, trajectory

CUT = {FinishReason.LENGTH, FinishReason.CONTEXT}


def options(**changes: Any) -> TrainingOptions:
    return TrainingOptions.model_validate({"learning_rate": 1e-3, "publish_dtype": "float32", **changes})


def gradients(step: list[TrajectoryGroup], **changes: Any) -> list[torch.Tensor]:
    """The gradient of a step, as the first moment after it shows it."""
    model = dense_model()
    trainer(model, options(max_gradient_norm=1e9, **changes)).train_step(1, step)
    return [p.grad for p in model.parameters() if p.grad is not None]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.allclose(x, y, rtol=1e-4, atol=1e-6) for x, y in zip(a, b, strict=True))


def cut_off(step: list[TrajectoryGroup], group: int, member: int) -> list[TrajectoryGroup]:
    changed = [*step]
    members = [*step[group].trajectories]
    members[member] = replace(members[member], finish_reason=FinishReason.LENGTH)
    changed[group] = replace(step[group], trajectories=tuple(members))
    return changed


def without(step: list[TrajectoryGroup], group: int, member: int) -> list[TrajectoryGroup]:
    changed = [*step]
    members = [t for index, t in enumerate(step[group].trajectories) if index != member]
    changed[group] = replace(step[group], trajectories=tuple(members))
    return changed


@pytest.mark.parametrize("reason", list(FinishReason))
def test_only_limits_of_tokens_count(reason: FinishReason) -> None:
    assert is_overlong(replace(trajectory("t", 8), finish_reason=reason)) == (reason in CUT)


def test_the_soft_penalty_is_daposs() -> None:
    lengths = np.array([1, 12, 14, 16, 20, 25])
    assert soft_penalty(lengths, 20, 8).tolist() == [0, 0, -0.25, -0.5, -1, -1]


@pytest.mark.parametrize(
    ("rule", "advantages", "counted"),
    [
        ("keep", [2 / 3, -1 / 3, -1 / 3], [True, True, True]),
        ("mask", [2 / 3, -1 / 3, 0], [True, True, True]),
        ("drop", [1 / 2, -1 / 2, 0], [True, True, False]),
    ],
)
def test_the_rules(rule: OverlongRule, advantages: list[float], counted: list[bool]) -> None:
    members = [trajectory(name, 8) for name in "abc"]
    members[2] = replace(members[2], finish_reason=FinishReason.CONTEXT)
    shaped = shape_group(members, np.array([1.0, 0, 0]), rule, group_advantages)
    assert shaped.advantages.tolist() == pytest.approx(advantages)
    assert shaped.counted.tolist() == counted


@pytest.mark.parametrize("aggregation", ["seq-mean-token-sum", "token-mean", "seq-mean-token-mean"])
def test_a_dropped_trajectory_might_as_well_not_be_there(aggregation: str) -> None:
    step = groups()
    expected = gradients(without(step, 0, 1), aggregation=aggregation)
    assert same(gradients(cut_off(step, 0, 1), overlong="drop", aggregation=aggregation), expected)
    assert not same(gradients(cut_off(step, 0, 1), overlong="keep", aggregation=aggregation), expected)


def test_a_masked_trajectory_still_is_part_of_the_baseline_and_the_counts() -> None:
    step = groups()
    kept, masked = gradients(step), gradients(cut_off(step, 0, 1), overlong="mask")
    alone = [*step]
    others_equal = tuple(
        replace(t, loss_mask=t.loss_mask if m == 1 else np.zeros_like(t.loss_mask))
        for m, t in enumerate(step[0].trajectories)
    )
    alone[0] = replace(step[0], trajectories=others_equal)
    for g in (1, 2):
        blank = tuple(replace(t, loss_mask=np.zeros_like(t.loss_mask)) for t in step[g].trajectories)
        alone[g] = replace(step[g], trajectories=blank)
    contribution = gradients(alone)  # of the one trajectory, with the same N and baseline
    assert same([m + c for m, c in zip(masked, contribution, strict=True)], kept)


def test_a_step_of_nothing_but_dropped_trajectories_has_no_gradient() -> None:
    step = groups()
    for g in range(3):
        for m in range(4):
            step = cut_off(step, g, m)
    model = dense_model()
    result = trainer(model, options(overlong="drop")).train_step(1, step)
    assert result.statistics["grad_norm"] == 0
    assert result.statistics["overlong_fraction"] == 1


def test_the_penalty_gives_equal_rewards_a_signal() -> None:
    step = [groups()[2]]  # all rewards are 1
    assert trainer(dense_model(), options()).train_step(1, step).statistics["grad_norm"] == 0
    punished = trainer(dense_model(), options(overlong_limit=12, overlong_cache=8)).train_step(1, step)
    assert punished.statistics["grad_norm"] > 0
    assert punished.statistics["reward_mean"] == 1  # as the environment gave it


@pytest.mark.parametrize("wrong", [{"overlong_limit": 5}, {"overlong_cache": 5}])
def test_half_a_penalty_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValidationError, match="together"):
        options(**wrong)
    with pytest.raises(ValidationError, match="must not be above"):
        options(overlong_limit=5, overlong_cache=6)


@pytest.mark.parametrize("moe", [False, True])
def test_bfloat16_products_leave_weights_and_moments_in_float32(moe: bool) -> None:
    step = groups(routing=moe)
    make = moe_model if moe else dense_model
    exact = trainer(make(), options(routing_replay=moe)).train_step(1, step).statistics
    model = make()
    taught = trainer(model, options(routing_replay=moe, compute_dtype="bfloat16"))
    rough = taught.train_step(1, step).statistics
    assert rough["loss"] != exact["loss"]
    assert rough["entropy"] == pytest.approx(exact["entropy"], rel=0.02)
    assert rough["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.1)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    before = {name: p.clone() for name, p in model.named_parameters()}
    taught.train_step(2, step)
    moved = [float((p.detach() - before[name].detach()).abs().max()) for name, p in model.named_parameters()]
    assert 0 < max(moved) < 1e-2  # smaller than bfloat16 could tell apart around 1
