"""Packed scoring equals scoring each trajectory alone with the model's own forward pass."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from learner.batch.packing import pack
from learner.policy.model import PolicyModel, Scores
from leeway.errors import ConfigError
from leeway.types import Trajectory
from tests.harness.learner_builders import dense_model, moe_model, trajectory


def alone(model: PreTrainedModel, t: Trajectory, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the trained tokens, from full logits."""
    logits = model(input_ids=torch.tensor(t.token_ids[None].astype(np.int64)), use_cache=False).logits[0].float()
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    places = torch.tensor(np.flatnonzero(t.loss_mask)) - 1
    tokens = torch.tensor(t.token_ids[t.loss_mask].astype(np.int64))
    return logprobs[places, tokens], -(logprobs.exp() * logprobs).sum(-1)[places]


def score(model: PreTrainedModel, rows: list[list[int]], trajectories: list[Trajectory]) -> Scores:
    policy = PolicyModel(model, routing_replay=False, gradient_checkpointing=False)
    with policy.scored(pack(rows, trajectories)) as scores:
        return scores


@pytest.mark.parametrize("make", [dense_model, moe_model])
@pytest.mark.parametrize("rows", [[[0, 1, 2]], [[1], [0, 2]], [[0], [1], [2]]])
def test_packed_scores_equal_each_alone(make: type, rows: list[list[int]]) -> None:
    model: PreTrainedModel = make().eval()
    trajectories = [trajectory(str(i), length, seed=i) for i, length in enumerate((5, 13, 9))]
    scores = score(model, rows, trajectories)
    expected = [alone(model, trajectories[index]) for row in rows for index in row]
    torch.testing.assert_close(scores.logprobs, torch.cat([e[0] for e in expected]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.entropies, torch.cat([e[1] for e in expected]), rtol=1e-5, atol=1e-5)
    assert scores.logprobs.dtype == torch.float32
    assert not scores.entropies.requires_grad


def test_temperature_divides_the_logits() -> None:
    model = dense_model().eval()
    warm, hot = trajectory("a", 7, temperature=0.7), trajectory("b", 7, temperature=2.0)
    scores = score(model, [[0, 1]], [warm, hot])
    expected = torch.cat([alone(model, warm, 0.7)[0], alone(model, hot, 2.0)[0]])
    torch.testing.assert_close(scores.logprobs, expected, rtol=1e-5, atol=1e-5)


def neighbours(model: PreTrainedModel, *, replay: bool = False) -> tuple[Tensor, Tensor]:
    """Log-probs [2, 6] of a trajectory and of its neighbour in the row, before and after the neighbour changes."""
    kept = trajectory("kept", 9, seed=1, routing=replay)
    changed = trajectory("changed", 9, seed=2, routing=replay)
    policy = PolicyModel(model, routing_replay=replay, gradient_checkpointing=False)
    scored: list[Tensor] = []
    for neighbour in (changed, replace(changed, token_ids=(changed.token_ids + 1) % 32)):
        batch = pack([[0, 1]], [neighbour, kept], with_routing=replay)
        if batch.routing is not None and batch.routed is not None:  # last tokens too, whose experts are free else
            experts = np.where(batch.routed[:, None, None], batch.routing, np.arange(2))
            batch = replace(batch, routing=experts, routed=np.ones_like(batch.routed))
        with policy.scored(batch) as scores:
            scored.append(scores.logprobs.detach())
    return torch.stack([s[6:] for s in scored]), torch.stack([s[:6] for s in scored])


@pytest.mark.parametrize("replay", [False, True], ids=["dense", "replayed experts"])
def test_nothing_crosses_between_trajectories(replay: bool) -> None:
    """Changing one trajectory changes no bit of its neighbour in the same row, where all products keep their shapes."""
    kept, changed = neighbours(moe_model() if replay else dense_model(), replay=replay)
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(changed[0], changed[1])


def test_only_rounding_crosses_between_trajectories_where_experts_are_chosen() -> None:
    """Each expert's tokens are one product, whose rounding depends on how many tokens of the neighbour are in it."""
    kept, changed = neighbours(moe_model())
    torch.testing.assert_close(kept[0], kept[1], rtol=1e-5, atol=1e-5)
    assert (changed[0] - changed[1]).abs().max() > 0.1


@pytest.mark.parametrize("make", [dense_model, moe_model])
def test_attention_that_crosses_between_trajectories_would_show(make: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted leak, plain causal attention over the row, is far larger than the tolerance above."""

    def leaking(segment_ids: np.ndarray) -> np.ndarray:
        return np.tril(np.ones((len(segment_ids), 1, segment_ids.shape[1], segment_ids.shape[1]), np.bool_))

    monkeypatch.setattr("learner.policy.model.attention_mask", leaking)
    kept, _ = neighbours(make())
    assert (kept[0] - kept[1]).abs().max() > 1e-2


def test_logits_are_made_for_targets_only() -> None:
    model = dense_model()
    policy = PolicyModel(model, routing_replay=False, gradient_checkpointing=False)
    rows: list[int] = []
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Module)
    head.register_forward_hook(lambda _m, inputs, _o: rows.append(inputs[0].shape[0]))
    with policy.scored(pack([[0]], [trajectory("a", 10, prompt=8)])):
        assert rows == [2]


def test_the_fused_head_never_runs_the_output_layer() -> None:
    """And scores without a loss are the reference's, without gradient."""
    model = dense_model()
    batch = pack([[0, 1]], [trajectory("a", 10, temperature=0.6), trajectory("b", 6)])
    policies = [
        PolicyModel(model, routing_replay=False, gradient_checkpointing=False, head=head)
        for head in ("reference", "fused")
    ]
    with policies[0].scored(batch) as reference:
        pass
    model.get_submodule("lm_head").register_forward_hook(lambda *_: pytest.fail("logits of a whole micro-batch"))
    with policies[1].scored(batch) as scores:
        scores.backward(None)
    torch.testing.assert_close(scores.logprobs, reference.logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.entropies, reference.entropies, rtol=1e-5, atol=1e-5)
    assert not scores.logprobs.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("frozen", ["lm_head", "model"])
def test_frozen_parts_get_no_gradient(frozen: str) -> None:
    batch = pack([[0, 1]], [trajectory("a", 10), trajectory("b", 6)])
    gradients: list[dict[str, Tensor]] = []
    for head in ("reference", "fused"):
        torch.manual_seed(0)
        model = dense_model(tied=False)
        model.get_submodule(frozen).requires_grad_(False)
        policy = PolicyModel(model, routing_replay=False, gradient_checkpointing=False, head=head)
        with policy.scored(batch, lambda _, scores: -scores.logprobs.sum()) as scores:
            scores.backward(None)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert not any(name.startswith(frozen + ".") for name in gradients[1])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))


def test_bfloat16_weights_collect_their_gradient_in_float32() -> None:
    """Two micro-batches, tied weights: float32's gradient, as far as bfloat16 layers go."""
    batches = [pack([[0]], [trajectory("a", 10)]), pack([[0]], [trajectory("b", 12, seed=1)])]
    gradients: list[dict[str, Tensor]] = []
    for model in (dense_model(), dense_model().bfloat16()):
        policy = PolicyModel(model, routing_replay=False, gradient_checkpointing=False, head="fused")
        for batch in batches:
            with policy.scored(batch, lambda _, scores: -scores.logprobs.sum()) as scores:
                assert scores.logprobs.dtype == torch.float32
                scores.backward(None)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        assert gradients[1][name].dtype == torch.bfloat16
        error = (gradients[1][name].float() - gradient).norm() / gradient.norm()
        assert error < 0.06, name


def test_a_head_that_is_more_than_a_linear_layer_is_refused_by_the_fused_one() -> None:
    model = dense_model()
    model.set_output_embeddings(nn.Sequential(model.get_submodule("lm_head")))
    PolicyModel(model, routing_replay=False, gradient_checkpointing=False, head="reference")
    with pytest.raises(ConfigError, match=r'set learner\.training\.head = "reference"'):
        PolicyModel(model, routing_replay=False, gradient_checkpointing=False, head="fused")


def test_gradient_checkpointing_gives_the_same_gradient_without_dropout() -> None:
    gradients: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        model = moe_model()
        model.config.attention_dropout = 0.5
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                setattr(module, "attention_dropout", 0.5)  # noqa: B010
        policy = PolicyModel(model, routing_replay=False, gradient_checkpointing=checkpointing)
        with policy.scored(pack([[0], [1]], [trajectory("a", 10), trajectory("b", 6)])) as scores:
            scores.logprobs.sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_a_model_that_changes_its_logits_after_the_head_is_refused() -> None:
    model = dense_model()
    forward = model.forward

    def capped(*args: object, **kwargs: object) -> object:
        output = forward(*args, **kwargs)
        output.logits = 5 * torch.tanh(output.logits / 5)
        return output

    model.forward = capped  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ConfigError, match="after the output layer"):
        PolicyModel(model, routing_replay=False, gradient_checkpointing=False)


def test_attention_that_ignores_the_mask_is_refused() -> None:
    model = dense_model()
    model.set_attn_implementation("eager")
    with pytest.raises(ConfigError, match="sdpa"):
        PolicyModel(model, routing_replay=False, gradient_checkpointing=False)
