"""The load-balancing loss: transformers' own for each trajectory, from native routing, summed whatever the packing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from learner.batch.packing import pack
from learner.policy.load_balancing import load_balancing_losses
from learner.policy.model import PolicyModel
from learner.policy.r3 import find_routers
from leeway.config import TrainingOptions
from leeway.errors import ConfigError
from leeway.types import Trajectory
from tests.harness.learner_builders import EXPERTS, SLOTS, dense_model, groups, moe_model, trainer, trajectory, weights

FAMILIES = ["qwen3_moe", "mixtral"]


def transformers_loss(model: PreTrainedModel, t: Trajectory) -> Tensor:
    return model(
        input_ids=torch.tensor(t.token_ids[None].astype("int64")), use_cache=False, output_router_logits=True
    ).aux_loss


def router_gradients(model: PreTrainedModel) -> list[Tensor]:
    return [router.get_parameter("weight").grad.clone() for router, _ in find_routers(model)]  # pyright: ignore[reportOptionalMemberAccess]


def test_worked_examples() -> None:
    logits = torch.tensor([[0.8, 0.2], [0.6, 0.4]]).log()
    losses = load_balancing_losses([logits], torch.tensor([0, 0]), 1, 1)
    torch.testing.assert_close(losses, torch.tensor([1.4]))
    balanced = load_balancing_losses([torch.zeros(3, 4)] * 2, torch.tensor([0, -1, 1]), 2, 2)
    torch.testing.assert_close(balanced, torch.tensor([2.0, 2.0]))
    collapsed = load_balancing_losses([torch.tensor([[9.0, 0, 0, 0]] * 3)], torch.tensor([0, 0, 0]), 1, 1)
    assert float(collapsed) == pytest.approx(4, abs=0.01)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_losses_and_gradients_are_those_of_transformers(family: str, checkpointing: bool) -> None:
    """Padding and neighbours take no part; dense layers have no share."""
    trajectories = [trajectory(name, n, seed=n) for name, n in (("a", 7), ("b", 12), ("c", 5))]
    order = [1, 0, 2]
    reference = moe_model(family=family).eval()
    expected = [transformers_loss(reference, trajectories[index]) for index in order]
    torch.stack(expected).sum().backward()
    model = moe_model(family=family)
    policy = PolicyModel(model, routing_replay=False, gradient_checkpointing=checkpointing, load_balancing=True)
    with policy.scored(pack([[1], [0, 2]], trajectories)) as scores:
        assert scores.load_balancing is not None
        scores.load_balancing.sum().backward()
    torch.testing.assert_close(scores.load_balancing, torch.stack(expected))
    for actual, wanted in zip(router_gradients(model), router_gradients(reference), strict=True):
        assert wanted.any()
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_choice_that_is_balanced_is_the_routers_own(family: str) -> None:
    """Under replay too: every expert's share comes from the live logits' top k, not from what was recorded."""
    t = trajectory("a", 9, routing=True)
    model = moe_model(family=family)
    seen: list[tuple[Tensor, Tensor]] = []
    policy = PolicyModel(model, routing_replay=True, gradient_checkpointing=False, load_balancing=True)
    for router, _ in find_routers(model):
        router.register_forward_hook(lambda _m, _i, o: seen.append((o[0].detach(), o[2])))
    with policy.scored(pack([[0]], [t], with_routing=True)) as scores:
        assert scores.load_balancing is not None
    p = torch.stack([torch.softmax(logits, -1) for logits, _ in seen]).double()  # [L, P, E]
    native = torch.zeros_like(p).scatter_(-1, p.topk(SLOTS, -1).indices, 1.0)
    replayed = torch.zeros_like(p).scatter_(-1, torch.stack([experts for _, experts in seen]), 1.0)
    by_native, by_replayed = (
        float(EXPERTS * (share.mean((0, 1)) * p.mean((0, 1))).sum()) for share in (native, replayed)
    )
    assert abs(by_native - by_replayed) > 1e-2
    assert float(scores.load_balancing.detach()) == pytest.approx(by_native, rel=1e-5)


@pytest.mark.parametrize("make", [dense_model, lambda: moe_model(family="deepseek_v3")])
def test_models_without_such_a_loss_are_refused(make: type) -> None:
    with pytest.raises(ConfigError, match=r"set learner\.training\.load_balancing = 0"):
        PolicyModel(make(), routing_replay=False, gradient_checkpointing=False, load_balancing=True)


def options(**changes: object) -> TrainingOptions:
    return TrainingOptions.model_validate(
        {"load_balancing": 0.5, "routing_replay": True, "learning_rate": 1e-2} | changes
    )


def test_a_step_does_not_depend_on_how_it_is_cut() -> None:
    """Trajectories without advantage are balanced too."""
    step = groups(routing=True)
    models = [moe_model(), moe_model()]
    large = trainer(models[0], options(micro_batch_tokens=10_000)).train_step(1, step)
    small = trainer(models[1], options(micro_batch_tokens=16, row_tokens=1)).train_step(1, step)
    assert large.statistics["load_balancing_loss"] == pytest.approx(small.statistics["load_balancing_loss"], rel=1e-5)
    assert large.statistics["grad_norm"] == pytest.approx(small.statistics["grad_norm"], rel=1e-4)
    assert 1 < large.statistics["load_balancing_loss"] < EXPERTS
    unlike = trainer(moe_model(), options(load_balancing=0.0)).train_step(1, step)
    assert "load_balancing_loss" not in unlike.statistics
    assert large.statistics["loss"] - unlike.statistics["loss"] == pytest.approx(
        0.5 * large.statistics["load_balancing_loss"], rel=1e-4
    )


def test_training_with_it_balances() -> None:
    taught = trainer(moe_model(), options(load_balancing=100.0))
    losses = [taught.train_step(step, groups(routing=True)).statistics["load_balancing_loss"] for step in range(1, 9)]
    assert losses[-1] < losses[0]


def test_without_it_equal_rewards_move_nothing() -> None:
    model = moe_model()
    before = weights(model)
    trainer(model, options(load_balancing=0.0, weight_decay=0.0)).train_step(1, groups(routing=True)[-1:])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    trainer(model, options(weight_decay=0.0)).train_step(1, groups(routing=True)[-1:])
    assert not all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
