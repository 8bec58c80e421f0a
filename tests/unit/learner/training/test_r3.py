"""Rollout routing replay: indices are replaced, gates and gradients are the live router's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from learner.batch.checks import check_routing
from learner.batch.packing import MicroBatch, pack
from learner.policy.model import PolicyModel, Scores
from learner.policy.r3 import RoutingReplay, find_routers
from leeway.errors import ConfigError, InvalidDataError, PreconditionError
from leeway.huggingface.moe import ROUTERS
from leeway.types import Array, Trajectory
from tests.harness.learner_builders import (
    EXPERTS,
    MOE,
    MOE_FAMILIES,
    SLOTS,
    dense_model,
    moe_model,
    random_routing,
    trajectory,
)

Router = tuple[Tensor, Tensor, Tensor]  # logits, gates, experts

every_family = pytest.mark.parametrize("family", MOE_FAMILIES)
every_law = pytest.mark.parametrize(
    ("family", "renormalise"),
    [
        (family, renormalise)
        for family in MOE_FAMILIES
        for renormalise in (True, False)
        if (family, renormalise) != ("mixtral", False)
    ],
)


def expected_gates(family: str, logits: Tensor, experts: Tensor, *, renormalise: bool) -> Tensor:
    """The families' laws, written another way than in learner.policy.r3."""
    chosen = logits.gather(-1, experts)
    if family == "deepseek_v3":
        sigmoid = 1 / (1 + (-chosen).exp())
        return 2.5 * (sigmoid / sigmoid.sum(-1, keepdim=True) if renormalise else sigmoid)
    over = chosen if family == "mixtral" or renormalise else logits
    return (chosen - over.logsumexp(-1, keepdim=True)).exp()


def native_routing(model: PreTrainedModel, t: Trajectory) -> Array:
    """[n, L, k] experts that the model chooses by itself, in slot order."""
    chosen: list[Tensor] = []
    handles = [router.register_forward_hook(lambda _m, _i, o: chosen.append(o[2])) for router, _ in find_routers(model)]
    with torch.no_grad():
        model(input_ids=torch.tensor(t.token_ids[None].astype(np.int64)), use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.stack(chosen, dim=1).numpy().astype(np.uint8)


def watch_routers(model: PreTrainedModel) -> list[Router]:
    """Filled with what each router hands on, in the order in which layers run.

    Before the replay is hooked on it is native; after, what the experts get.
    """
    seen: list[Any] = []
    for router, _ in find_routers(model):
        router.register_forward_hook(lambda _m, _i, o: seen.append(o))
    return seen


def with_native_routing(model: PreTrainedModel, t: Trajectory) -> Trajectory:
    return replace(t, routing=native_routing(model, t)[:-1])


def replaying(model: PreTrainedModel) -> tuple[PolicyModel, list[Router], list[Router]]:
    """The policy, what its routers choose, and what its experts get."""
    native = watch_routers(model)
    policy = PolicyModel(model, routing_replay=True, gradient_checkpointing=False)
    native.clear()  # of what the policy tried on the model
    return policy, native, watch_routers(model)


def scored_gradient(
    model: PreTrainedModel, batch: MicroBatch, *, replayed: bool, checkpointing: bool = False
) -> tuple[Scores, dict[str, Tensor]]:
    policy = PolicyModel(model, routing_replay=replayed, gradient_checkpointing=checkpointing)
    model.zero_grad()
    with policy.scored(batch) as scores:
        scores.logprobs.sum().backward()
    return scores, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("dtype", "checkpointing"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)]
)
@every_law
def test_replaying_the_native_choice_changes_no_bit(
    family: str, renormalise: bool, dtype: torch.dtype, checkpointing: bool
) -> None:
    """Neither of the log-probs nor of any gradient, the routers' included; several trajectories share a row."""

    def make() -> PreTrainedModel:
        model: Any = moe_model(family=family, renormalise=renormalise)
        return model.to(dtype).eval()

    trajectories = [with_native_routing(make(), trajectory(str(i), n, seed=i)) for i, n in enumerate((6, 11, 8))]
    batch = pack([[1], [0, 2]], trajectories, with_routing=True)
    native, native_gradients = scored_gradient(make(), batch, replayed=False)
    replay, replay_gradients = scored_gradient(make(), batch, replayed=True, checkpointing=checkpointing)
    assert torch.equal(native.logprobs, replay.logprobs)
    assert native_gradients.keys() == replay_gradients.keys()
    for name, gradient in native_gradients.items():
        assert torch.equal(gradient, replay_gradients[name]), name
    routers = [name for name in native_gradients if "gate.weight" in name]
    assert len(routers) == MOE.moe_layers
    assert all(native_gradients[name].any() for name in routers)


@every_law
def test_replayed_experts_with_live_gates(family: str, renormalise: bool) -> None:
    """Experts get the recorded indices, in slot order, with the family's gates; gradient reaches every router."""
    model = moe_model(family=family, renormalise=renormalise).eval()
    t = trajectory("a", 9, routing=True)
    assert t.routing is not None
    policy, native, seen = replaying(model)
    with policy.scored(pack([[0]], [t], with_routing=True)) as scores:
        scores.logprobs.sum().backward()
    assert len(seen) == MOE.moe_layers
    for layer, ((logits, gates, experts), (native_logits, _, native_experts)) in enumerate(
        zip(seen, native, strict=True)
    ):
        assert (experts[:-1].numpy() == t.routing[:, layer]).all()
        assert (experts[:-1] != native_experts[:-1]).any()
        torch.testing.assert_close(gates, expected_gates(family, logits, experts, renormalise=renormalise))
        # The last token was never routed by the engine: it keeps its native choice.
        assert torch.equal(experts[-1], native_experts[-1])
        assert torch.equal(logits, native_logits)
    for router, _ in find_routers(model):
        gradient = router.get_parameter("weight").grad
        assert gradient is not None
        assert gradient.any()


@every_law
def test_gates_have_the_gradient_of_their_law(family: str, renormalise: bool) -> None:
    """Mixtral's p[i] / sum p[i] is softmax(z[i]): logits that were not chosen get none."""
    router, gates = find_routers(moe_model(family=family, renormalise=renormalise))[0]
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(7, EXPERTS, generator=generator)
    experts = torch.from_numpy(random_routing(7, 0)[:, 0].astype(np.int64))
    direction = torch.randn(7, SLOTS, generator=generator)

    def gradient(dtype: torch.dtype, law: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        z = logits.to(dtype, copy=True).requires_grad_()
        values = law(z)
        (values * direction.to(dtype)).sum().backward()
        assert z.grad is not None
        return values.detach().double(), z.grad.double()

    actual = gradient(torch.float32, lambda z: gates(router, z, experts))
    expected = gradient(torch.float64, lambda z: expected_gates(family, z, experts, renormalise=renormalise))
    for left, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


def test_a_correction_bias_chooses_and_does_not_weigh() -> None:
    """Whatever DeepSeek-V3's bias, the gates of given experts are the same."""
    t = trajectory("a", 9, routing=True)
    gates: list[Tensor] = []
    for bias in (0.0, 1.0):
        model = moe_model(family="deepseek_v3").eval()
        for router, _ in find_routers(model):
            router.get_buffer("e_score_correction_bias").copy_(bias * torch.arange(EXPERTS))
        policy, native, seen = replaying(model)
        with policy.scored(pack([[0]], [t], with_routing=True)):
            gates.append(seen[0][1][:-1].detach())
        if bias:
            assert set(native[0][2].flatten().tolist()) <= {2, 3, 4, 5}  # the two groups that the bias prefers
    assert torch.equal(gates[0], gates[1])


@every_family
def test_padding_is_routed_natively(family: str) -> None:
    """Zero-filled routing would send every padding token to expert 0."""
    policy, native, seen = replaying(moe_model(family=family).eval())
    short, long = trajectory("short", 5, routing=True), trajectory("long", 12, seed=1, routing=True)
    padding = slice(12 + 5, 24)
    with policy.scored(pack([[1], [0]], [short, long], with_routing=True)):
        for (_, gates, experts), (_, native_gates, native_experts) in zip(seen, native, strict=True):
            assert torch.equal(experts[padding], native_experts[padding])
            assert torch.equal(gates[padding], native_gates[padding])
            assert (experts.sort(-1).values.diff(dim=-1) > 0).all()


@every_family
def test_neighbours_in_a_row_keep_their_own_routing(family: str) -> None:
    """Packed, each trajectory's experts and log-probs are those it has alone; its last token is native."""
    trajectories = [trajectory(name, n, seed=n, routing=True) for name, n in (("a", 7), ("b", 5), ("c", 9))]
    packed, _ = scored_gradient(
        moe_model(family=family), pack([[0, 1, 2]], trajectories, with_routing=True), replayed=True
    )
    alone = [
        scored_gradient(moe_model(family=family), pack([[index]], trajectories, with_routing=True), replayed=True)[0]
        for index in range(3)
    ]
    torch.testing.assert_close(packed.logprobs, torch.cat([scores.logprobs for scores in alone]), rtol=1e-5, atol=1e-5)
    policy, native, seen = replaying(moe_model(family=family).eval())
    with policy.scored(pack([[0, 1, 2]], trajectories, with_routing=True)):
        for layer, ((_, _, experts), (_, _, native_experts)) in enumerate(zip(seen, native, strict=True)):
            start = 0
            for t in trajectories:
                assert t.routing is not None
                end = start + t.num_tokens - 1
                assert (experts[start:end].numpy() == t.routing[:, layer]).all()
                assert torch.equal(experts[end], native_experts[end])
                start = end + 1


def test_slot_order_is_kept() -> None:
    model = moe_model().eval()
    t = trajectory("a", 6, routing=True)
    assert t.routing is not None
    policy, _, seen = replaying(model)
    descending = replace(t, routing=np.sort(t.routing, axis=-1)[..., ::-1].copy())
    with policy.scored(pack([[0]], [descending], with_routing=True)):
        experts = seen[0][2]
        assert (experts[:-1, 0] > experts[:-1, 1]).all()


@every_family
def test_gradient_checkpointing_recomputes_with_the_same_choice(family: str) -> None:
    batch = pack([[0, 1]], [trajectory(n, 9, seed=i, routing=True) for i, n in enumerate("ab")], with_routing=True)
    plain, plain_gradients = scored_gradient(moe_model(family=family), batch, replayed=True)
    model = moe_model(family=family)
    calls: list[int] = []
    find_routers(model)[0][0].register_forward_hook(lambda _m, _i, o: calls.append(len(o[0])))
    recomputed, recomputed_gradients = scored_gradient(model, batch, replayed=True, checkpointing=True)
    assert calls.count(18) == 2
    assert torch.equal(plain.logprobs, recomputed.logprobs)
    for name, gradient in plain_gradients.items():
        assert torch.equal(gradient, recomputed_gradients[name]), name


@pytest.mark.parametrize(
    ("family", "layers"), [("qwen3_moe", (0, 2)), ("mixtral", (0, 1)), ("deepseek_v3", (1, 2))], ids=MOE_FAMILIES
)
def test_layers_are_bound_by_module(family: str, layers: tuple[int, int]) -> None:
    """Routing's layer axis counts MoE layers by their numbers, not by a place in a list; dense layers have none."""
    model = moe_model(family=family)
    found = [router for router, _ in find_routers(model)]
    names = [name for name, module in model.named_modules() if module in found]
    assert names == [f"model.layers.{number}.mlp.gate" for number in layers]
    first, last = (model.get_submodule(f"model.layers.{number}.mlp") for number in layers)
    reordered = torch.nn.ModuleDict({"10": first, "2": last})
    assert [router for router, _ in find_routers(reordered)] == [last.gate, first.gate]


def test_a_subclass_of_a_router_is_one() -> None:
    """Sharding replaces a module's class by one made from it."""
    model = moe_model()
    for router, _ in find_routers(model):
        router.__class__ = type("Sharded", (type(router),), {})
    assert len(find_routers(model)) == MOE.moe_layers


def test_every_family_has_its_law() -> None:
    laws = {
        router.__name__: gates
        for f in MOE_FAMILIES
        for r, gates in find_routers(moe_model(family=f))
        for router in [type(r)]
    }
    assert laws.keys() == ROUTERS
    assert len(set(laws.values())) == 3


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


def test_a_dense_model_has_nothing_to_replay() -> None:
    with pytest.raises(ConfigError, match="no router"):
        RoutingReplay(dense_model())


def spoiled(**changes: Any) -> Array:
    """Good routing of 9 tokens with one thing wrong."""
    routing = random_routing(8, 0).astype(changes.get("dtype", np.uint8))
    if "expert" in changes:
        routing[2, 1, 0] = changes["expert"]
    else:
        routing[changes["place"]] = changes.get("value", 0)
    return routing


@pytest.mark.parametrize(
    ("routing", "message"),
    [
        (None, "has no routing"),
        (random_routing(9, 0), r"shape \[9, 2, 2\] where .* is \[8, 2, 2\]"),
        (random_routing(7, 0), "rows are missing"),
        (random_routing(8, 0)[:, :1], "another model"),
        (random_routing(8, 0)[..., :1], "another model"),
        (random_routing(8, 0).repeat(2, axis=1), "another model"),
        (spoiled(expert=EXPERTS), rf"token 2 was routed to expert {EXPERTS} of a model with {EXPERTS} in MoE layer 1"),
        (spoiled(expert=-1, dtype=np.int32), "token 2 was routed to expert -1"),
        (spoiled(expert=int(random_routing(8, 0)[2, 1, 1])), "token 2 names an expert twice in MoE layer 1"),
        (np.zeros((8, 2, 2), dtype=np.uint8), "token 0 names an expert twice in MoE layer 0"),
        (spoiled(place=np.s_[5]), "token 5 names an expert twice in MoE layer 0; its routing was not fully recorded"),
        (spoiled(place=np.s_[6, 1]), "token 6 names an expert twice in MoE layer 1"),
        (spoiled(place=np.s_[3, 0, 1:], value=255), "token 3 was routed to expert 255"),
    ],
    ids=[
        "missing",
        "a row for the last token",
        "a row is missing",
        "a layer is missing",
        "a slot is missing",
        "too many layers",
        "out of range",
        "negative",
        "duplicate",
        "zeros",
        "a boundary token left at zero",
        "a row filled in one layer only",
        "a row filled in one slot only",
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
