"""Rollout routing replay: indices are replaced, gates and gradients are the live router's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from learner.model import PolicyModel, Scores
from learner.packing import MicroBatch, pack
from learner.r3 import RoutingReplay, check_routing, find_routers
from leeway.errors import ConfigError, InvalidDataError, PreconditionError
from leeway.types import Array, Trajectory
from tests.unit.learner.helpers import EXPERTS, MOE, SLOTS, dense_model, moe_model, random_routing, trajectory


def native_routing(model: PreTrainedModel, t: Trajectory) -> Array:
    """[n, L, k] experts that the model chooses by itself, in slot order."""
    chosen: list[Tensor] = []
    handles = [router.register_forward_hook(lambda _m, _i, o: chosen.append(o[2])) for router, _ in find_routers(model)]
    with torch.no_grad():
        model(input_ids=torch.tensor(t.token_ids[None].astype(np.int64)), use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.stack(chosen, dim=1).numpy().astype(np.uint8)


def watch_routers(model: PreTrainedModel) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Filled with what each router hands on: logits, gates, experts."""
    seen: list[Any] = []
    for router, _ in find_routers(model):
        router.register_forward_hook(lambda _m, _i, o: seen.append(o))
    return seen


def with_native_routing(model: PreTrainedModel, t: Trajectory) -> Trajectory:
    return replace(t, routing=native_routing(model, t)[:-1])


def scored_gradient(
    model: PreTrainedModel, batch: MicroBatch, *, replayed: bool, checkpointing: bool = False
) -> tuple[Scores, dict[str, Tensor]]:
    policy = PolicyModel(model, routing_replay=replayed, gradient_checkpointing=checkpointing)
    model.zero_grad()
    with policy.scored(batch) as scores:
        scores.logprobs.sum().backward()
    return scores, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("renormalise", [True, False])
def test_replaying_the_native_choice_changes_no_bit(renormalise: bool) -> None:
    """Neither of the log-probs nor of any gradient, the gates' included."""
    make = lambda: moe_model(renormalise=renormalise).eval()  # noqa: E731
    trajectories = [with_native_routing(make(), trajectory(str(i), n, seed=i)) for i, n in enumerate((6, 11, 8))]
    batch = pack([[1], [0, 2]], trajectories, with_routing=True)
    native, native_gradients = scored_gradient(make(), batch, replayed=False)
    replay, replay_gradients = scored_gradient(make(), batch, replayed=True)
    assert torch.equal(native.logprobs, replay.logprobs)
    for name, gradient in native_gradients.items():
        assert torch.equal(gradient, replay_gradients[name]), name
    assert any("gate.weight" in name and gradient.any() for name, gradient in native_gradients.items())


def test_replayed_experts_with_live_gates() -> None:
    """An expert layer gets the recorded indices and p[i] / sum p[i]; gradient reaches the router through them."""
    model = moe_model().eval()
    t = trajectory("a", 9, routing=True)
    assert t.routing is not None
    assert (native_routing(model, t)[:-1] != t.routing).any()
    policy = PolicyModel(model, routing_replay=True, gradient_checkpointing=False)
    seen = watch_routers(model)
    with policy.scored(pack([[0]], [t], with_routing=True)) as scores:
        scores.logprobs.sum().backward()
    for layer, (logits, gates, experts) in enumerate(seen):
        assert (experts[:-1].numpy() == t.routing[:, layer]).all()
        chosen = torch.softmax(logits, -1).gather(-1, experts)
        torch.testing.assert_close(gates, chosen / chosen.sum(-1, keepdim=True))
        # The last token was never routed by the engine: it keeps its native choice.
        assert experts[-1].tolist() == logits[-1].topk(SLOTS).indices.tolist()
    for router, _ in find_routers(model):
        gradient = router.get_parameter("weight").grad
        assert gradient is not None
        assert gradient.any()


def test_routing_without_renormalisation_keeps_the_softmax() -> None:
    model = moe_model(renormalise=False).eval()
    policy = PolicyModel(model, routing_replay=True, gradient_checkpointing=False)
    seen = watch_routers(model)
    with policy.scored(pack([[0]], [trajectory("a", 9, routing=True)], with_routing=True)):
        logits, gates, experts = seen[0]
        torch.testing.assert_close(gates, torch.softmax(logits, -1).gather(-1, experts))


def test_padding_is_routed_natively() -> None:
    """Zero-filled routing would send every padding token to expert 0."""
    model = moe_model().eval()
    policy = PolicyModel(model, routing_replay=True, gradient_checkpointing=False)
    seen = watch_routers(model)
    short, long = trajectory("short", 5, routing=True), trajectory("long", 12, seed=1, routing=True)
    with policy.scored(pack([[1], [0]], [short, long], with_routing=True)):
        for logits, _, experts in seen:
            padding = slice(12 + 5, 24)
            assert torch.equal(experts[padding], logits[padding].topk(SLOTS).indices)
            assert (experts.sort(-1).values.diff(dim=-1) > 0).all()


def test_slot_order_is_kept() -> None:
    model = moe_model().eval()
    t = trajectory("a", 6, routing=True)
    assert t.routing is not None
    seen: list[Tensor] = []
    policy = PolicyModel(model, routing_replay=True, gradient_checkpointing=False)
    find_routers(model)[0][0].register_forward_hook(lambda _m, _i, o: seen.append(o[2]))
    descending = replace(t, routing=np.sort(t.routing, axis=-1)[..., ::-1].copy())
    with policy.scored(pack([[0]], [descending], with_routing=True)):
        assert (seen[0][:-1, 0] > seen[0][:-1, 1]).all()


def test_gradient_checkpointing_recomputes_with_the_same_choice() -> None:
    batch = pack([[0, 1]], [trajectory(n, 9, seed=i, routing=True) for i, n in enumerate("ab")], with_routing=True)
    plain, plain_gradients = scored_gradient(moe_model(), batch, replayed=True)
    model = moe_model()
    calls: list[int] = []
    find_routers(model)[0][0].register_forward_hook(lambda _m, _i, o: calls.append(len(o[0])))
    recomputed, recomputed_gradients = scored_gradient(model, batch, replayed=True, checkpointing=True)
    assert calls.count(18) == 2
    assert torch.equal(plain.logprobs, recomputed.logprobs)
    for name, gradient in plain_gradients.items():
        assert torch.equal(gradient, recomputed_gradients[name]), name


def test_layers_are_bound_by_module() -> None:
    """Routing's layer axis counts MoE layers by number: here layers 0 and 2 of three, eleven and more in order too."""
    model = moe_model()
    found = [router for router, _ in find_routers(model)]
    names = [name for name, module in model.named_modules() if module in found]
    assert names == ["model.layers.0.mlp.gate", "model.layers.2.mlp.gate"]
    first, last = (model.get_submodule(f"model.layers.{number}.mlp") for number in (0, 2))
    reordered = torch.nn.ModuleDict({"10": first, "2": last})
    assert [router for router, _ in find_routers(reordered)] == [last.gate, first.gate]


def test_without_an_active_replay_nothing_changes() -> None:
    model = moe_model().eval()
    t = trajectory("a", 9)
    before = native_routing(model, t)
    replay = RoutingReplay(model)
    assert (native_routing(model, t) == before).all()
    with replay.active(torch.from_numpy(random_routing(9, 3)), torch.ones(9, dtype=torch.bool)):
        assert (native_routing(model, t) == random_routing(9, 3)).all()
    assert (native_routing(model, t) == before).all()
    five = torch.from_numpy(random_routing(5, 3)), torch.ones(5, dtype=torch.bool)
    with replay.active(*five), pytest.raises(PreconditionError, match="routes 9 tokens while 5"):
        native_routing(model, t)
    replay.remove()


def test_a_dense_model_has_nothing_to_replay() -> None:
    with pytest.raises(ConfigError, match="no router"):
        RoutingReplay(dense_model())


def spoiled(routing: Array, **changes: int) -> Array:
    changed = routing.copy()
    changed[2, 1, 0] = changes.get("expert", int(changed[2, 1, 1]))
    return changed


@pytest.mark.parametrize(
    ("routing", "message"),
    [
        (None, "has no routing"),
        (random_routing(9, 0), r"shape \[9, 2, 2\] where .* is \[8, 2, 2\]"),
        (random_routing(7, 0), "rows are missing"),
        (random_routing(8, 0)[:, :1], "another model"),
        (random_routing(8, 0)[..., :1], "another model"),
        (spoiled(random_routing(8, 0), expert=EXPERTS), f"expert {EXPERTS} of a model with {EXPERTS}"),
        (spoiled(random_routing(8, 0)), "token 2 names an expert twice in MoE layer 1"),
        (np.zeros((8, 2, 2), dtype=np.uint8), "not fully recorded"),
    ],
)
def test_bad_routing_is_refused_by_trajectory(routing: Array | None, message: str) -> None:
    t = replace(trajectory("suspect", 9), routing=routing)
    with pytest.raises(InvalidDataError, match=message) as refusal:
        check_routing(t, MOE)
    assert "trajectory suspect" in str(refusal.value)


def test_good_routing_passes() -> None:
    check_routing(trajectory("a", 9, routing=True), MOE)
    check_routing(replace(trajectory("a", 9), routing=random_routing(8, 0).astype(np.uint16)), MOE)
    check_routing(trajectory("a", 1, prompt=1, routing=True), MOE)
