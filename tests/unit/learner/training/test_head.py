"""The fused head gives the numbers of plain autograd, in less memory, without work for tokens without a gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from learner.losses.form import TokenBatch, load_algorithm, token_losses
from learner.policy.head import Head, Targets, TokenLoss, TokenScores, chunk
from learner.policy.head.fused import FusedResult, fused_head
from learner.policy.head.output import scores_of_logits
from leeway.config.algorithms import ALGORITHMS

HIDDEN = 12
VOCABULARY = 53  # not a multiple of the tile's width
TILE = 16
CHUNK = 8


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setitem(chunk._TILE_WIDTH, "cpu", TILE)


def problem(
    num_tokens: int, dtype: torch.dtype = torch.float32, *, top: int = 0, bias: bool = False, seed: int = 0
) -> tuple[Tensor, Head, Targets]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn((num_tokens, HIDDEN), generator=generator).to(dtype)
    weight = torch.randn((VOCABULARY, HIDDEN), generator=generator).to(dtype)
    targets = Targets(
        torch.randint(VOCABULARY, (num_tokens,), generator=generator),
        0.5 + torch.rand(num_tokens, generator=generator),
        torch.randint(VOCABULARY, (num_tokens, top), generator=generator) if top else None,
    )
    return hidden, Head(weight, torch.randn(VOCABULARY, generator=generator).to(dtype) if bias else None), targets


def policy_loss(algorithm: str, num_tokens: int, *, zero_every: int = 3) -> TokenLoss:
    """A registered loss as the trainer applies it, with advantage zero for some tokens and some tokens masked."""
    generator = torch.Generator().manual_seed(1)
    behavior = -4 * torch.rand(num_tokens, generator=generator)
    advantages = torch.randn(num_tokens, generator=generator)
    advantages[::zero_every] = 0.0
    weights = torch.rand(num_tokens, generator=generator)
    found = ALGORITHMS[algorithm]
    parameters, decide = found.defaults, load_algorithm(found)

    def loss(places: slice, scores: TokenScores) -> Tensor:
        logprobs = scores.logprobs
        tokens = TokenBatch(
            policy_logprobs=logprobs,
            behavior_logprobs=behavior[places],
            advantages=advantages[places],
            loss_mask=torch.ones_like(logprobs, dtype=torch.bool),
            sequence_ids=torch.zeros_like(logprobs, dtype=torch.int64),
        )
        losses, _ = token_losses(tokens, decide, parameters)
        return (losses * weights[places]).sum()

    return loss


def top_weighted(places: slice, scores: TokenScores) -> Tensor:
    """A loss whose coefficient depends on everything that a chunk knows."""
    coefficient = 1 + scores.logprobs.detach().exp()
    if scores.topk_logprobs is not None:
        coefficient = coefficient + scores.topk_logprobs.exp().sum(-1)
    return -(coefficient * scores.logprobs).sum()


def with_entropy(places: slice, scores: TokenScores) -> Tensor:
    return top_weighted(places, scores) - 0.3 * (scores.entropies * scores.entropies).sum()


def reference_head(hidden: Tensor, head: Head, targets: Targets) -> TokenScores:
    """log pi = log_softmax((h W^T + b) / temperature), with gradient."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = hidden.to(dtype) @ head.weight.to(dtype).T
    return scores_of_logits(logits if head.bias is None else logits + head.bias.to(dtype), targets)


def by_autograd(
    hidden: Tensor, head: Head, targets: Targets, loss: TokenLoss
) -> tuple[TokenScores, Tensor, tuple[Tensor, ...]]:
    """Everything from the reference, weights at least float32."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    leaves = [x.to(dtype).requires_grad_() for x in (hidden, head.weight, head.bias) if x is not None]
    scores = reference_head(leaves[0], Head(leaves[1], *leaves[2:]), targets)
    value = loss(slice(None), scores)
    return scores, value, torch.autograd.grad(value, leaves)


def fused(
    hidden: Tensor, head: Head, targets: Targets, loss: TokenLoss | None, chunk: int = CHUNK
) -> tuple[FusedResult, tuple[Tensor, ...]]:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    into = [torch.zeros_like(x, dtype=dtype) for x in (head.weight, head.bias) if x is not None]
    result = fused_head(
        hidden,
        head,
        targets,
        loss,
        weight_gradient=into[0],
        bias_gradient=into[1] if len(into) > 1 else None,
        chunk_tokens=chunk,
    )
    return result, ((result.gradients.hidden, *into) if result.gradients is not None else ())


def assert_equal_to_reference(
    hidden: Tensor, head: Head, targets: Targets, loss: TokenLoss, tolerance: float, chunk: int = CHUNK
) -> None:
    scores, value, gradients = by_autograd(hidden, head, targets, loss)
    result, own = fused(hidden, head, targets, loss, chunk)
    assert result.loss is not None
    close(result.scores.logprobs, scores.logprobs, tolerance)
    close(result.scores.entropies, scores.entropies, tolerance)
    if scores.topk_logprobs is None:
        assert result.scores.topk_logprobs is None
    else:
        assert result.scores.topk_logprobs is not None
        close(result.scores.topk_logprobs, scores.topk_logprobs, tolerance)
    close(result.loss, value, tolerance)
    for gradient, expected in zip(own, gradients, strict=True):
        close(gradient, expected, tolerance)


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Element by element, relative to the largest."""
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * float(expected.detach().abs().max()))


@pytest.mark.parametrize("num_tokens", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
@pytest.mark.parametrize("top", [0, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_scores_and_gradients_equal_the_reference(num_tokens: int, top: int, bias: bool) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)):
        for loss in (top_weighted, with_entropy):
            assert_equal_to_reference(*problem(num_tokens, dtype, top=top, bias=bias), loss, tolerance)


@pytest.mark.parametrize("algorithm", ["dppo-binary-tv", "dppo-binary-kl", "cispo", "grpo-clip-higher"])
@pytest.mark.parametrize("chunk", [1, CHUNK, 1000])
def test_policy_losses_equal_the_reference(algorithm: str, chunk: int) -> None:
    assert_equal_to_reference(*problem(29), policy_loss(algorithm, 29), 1e-5, chunk)


def test_a_worked_number() -> None:
    """log pi = log(1/17); d loss / d h = 2 (16/17) log 4, and twice the probability for the weight's row."""
    targets = Targets(torch.tensor([0]), torch.tensor([0.5]))
    head = Head(torch.tensor([[0.0], [math.log(4)]], dtype=torch.float64))
    result, (hidden, weight) = fused(
        torch.ones((1, 1), dtype=torch.float64), head, targets, lambda _, scores: -scores.logprobs.sum()
    )
    assert result.loss is not None
    assert result.loss.item() == pytest.approx(math.log(17), rel=1e-14)
    assert hidden.item() == pytest.approx(2 * 16 / 17 * math.log(4), rel=1e-14)
    assert weight.flatten().tolist() == pytest.approx([-2 * 16 / 17, 2 * 16 / 17], rel=1e-14)


@pytest.mark.parametrize("height", [60.0, 800.0, -800.0])
def test_logits_far_above_or_below_the_first_ones_do_not_overflow(height: float) -> None:
    """The highest logits lie in the last tile, beyond what exp could hold, for some of the tokens."""
    hidden, head, targets = problem(CHUNK + 3, torch.float64, bias=True)
    head.weight[:, 0] = 0
    head.weight[-3:, 0] = height
    hidden[:, 0] = torch.arange(CHUNK + 3) % 3 / 2
    for loss in (top_weighted, with_entropy):
        assert_equal_to_reference(hidden, head, targets, loss, 1e-11)
    scores_only, _ = fused(hidden, head, targets, None)
    close(scores_only.scores.entropies, reference_head(hidden, head, targets).entropies, 1e-11)


def test_logits_that_rise_from_tile_to_tile() -> None:
    """The second tile lies within what exp may hold above the first, the third just beyond: both count."""
    hidden, head, targets = problem(CHUNK + 3, torch.float64)
    head.weight.mul_(0.1)
    head.weight[:, 0] = torch.tensor([0.0, 39.0, 42.0, 40.0]).repeat_interleave(TILE)[:VOCABULARY]
    hidden[:, 0] = torch.tensor([1.0, 0.5]).repeat(CHUNK)[: CHUNK + 3]
    for loss in (top_weighted, with_entropy):
        assert_equal_to_reference(hidden, head, replace(targets, temperatures=torch.ones(CHUNK + 3)), loss, 1e-11)


def test_without_a_loss_there_are_only_scores() -> None:
    hidden, head, targets = problem(19, top=2)
    result, _ = fused(hidden, head, targets, None)
    scores = reference_head(hidden, head, targets)
    assert result.loss is None
    assert result.gradients is None
    close(result.scores.logprobs, scores.logprobs, 1e-5)
    close(result.scores.entropies, scores.entropies, 1e-5)


def test_a_frozen_weight_needs_no_gradient() -> None:
    hidden, head, targets = problem(10)
    result = fused_head(hidden, head, targets, top_weighted, chunk_tokens=CHUNK)
    assert result.gradients is not None
    assert result.gradients.weight is None
    close(result.gradients.hidden, by_autograd(hidden, head, targets, top_weighted)[2][0], 1e-5)


def test_gradients_are_added_to_what_is_there() -> None:
    hidden, head, targets = problem(10)
    weight = torch.ones_like(head.weight)
    fused_head(hidden, head, targets, top_weighted, weight_gradient=weight)
    close(weight - 1, by_autograd(hidden, head, targets, top_weighted)[2][1], 1e-5)


def some_zero(zero: Tensor) -> TokenLoss:
    return lambda places, scores: -(torch.where(zero[places], 0.0, 1.0) * scores.logprobs).sum()


@pytest.mark.parametrize("pattern", ["0100010011110001101", "1" * 19, "0" * 19, "1" * 8 + "0" * 11, "0" * 11 + "1" * 8])
def test_tokens_with_coefficient_zero_have_a_gradient_of_exactly_zero(pattern: str) -> None:
    zero = torch.tensor([mark == "0" for mark in pattern])
    hidden, head, targets = problem(len(pattern))
    result, (hidden_gradient, weight_gradient) = fused(hidden, head, targets, some_zero(zero))
    assert (hidden_gradient[zero] == 0).all()
    assert (hidden_gradient[~zero] != 0).any(dim=-1).all()
    expected = by_autograd(hidden, head, targets, some_zero(zero))
    close(hidden_gradient, expected[2][0], 1e-5)
    close(weight_gradient, expected[2][1], 1e-5)
    close(result.scores.entropies, expected[0].entropies, 1e-5)


class Recorder(TorchDispatchMode):
    """Notes the multiply-adds of every matrix product and the largest tensor that an operator made."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm_", "addmm"):
            left, right = args[-2:]
            self.products += left.shape[0] * left.shape[1] * right.shape[1]
        self.largest = max([self.largest, *(leaf.numel() for leaf in tensors(out))])
        return out


def tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


@pytest.mark.parametrize("pattern", ["10" * 8, "0" * 16, "1" * 16, "0" * 5 + "1" * 11])
def test_tokens_with_coefficient_zero_do_no_backward_work(pattern: str) -> None:
    zero = torch.tensor([mark == "0" for mark in pattern])
    hidden, head, targets = problem(len(pattern))
    with Recorder() as record:
        fused(hidden, head, targets, some_zero(zero))
    one_product = VOCABULARY * HIDDEN
    assert record.products == one_product * (len(pattern) + 2 * pattern.count("1"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_as_large_as_tokens_times_vocabulary(dtype: torch.dtype) -> None:
    num_tokens, vocabulary = 40 * CHUNK, 11 * TILE
    hidden = torch.randn((num_tokens, HIDDEN)).to(dtype)
    weight = torch.randn((vocabulary, HIDDEN)).to(dtype)
    targets = Targets(torch.arange(num_tokens) % vocabulary, torch.ones(num_tokens), torch.zeros(num_tokens, 3).long())
    with Recorder() as record:
        fused_head(hidden, Head(weight), targets, with_entropy, chunk_tokens=CHUNK)
    assert record.largest <= max(CHUNK * vocabulary, num_tokens * HIDDEN)
    with Recorder() as record:
        fused_head(hidden, Head(weight), targets, chunk_tokens=CHUNK)
    assert record.largest <= num_tokens * HIDDEN
    with Recorder() as record:
        reference_head(hidden, Head(weight), targets)
    assert record.largest == num_tokens * vocabulary


def test_the_same_inputs_give_the_same_bits() -> None:
    hidden, head, targets = problem(29, top=3)
    loss = policy_loss("dppo-binary-tv", 29)
    (first, gradients), (second, again) = (fused(hidden, head, targets, loss) for _ in range(2))
    assert torch.equal(first.scores.logprobs, second.scores.logprobs)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))


def test_what_is_not_finite_shows() -> None:
    hidden, head, targets = problem(CHUNK)
    hidden[2, 3] = math.nan
    result, (hidden_gradient, _) = fused(hidden, head, targets, lambda _, s: -(s.logprobs.detach() * s.logprobs).sum())
    assert result.loss is not None
    assert not result.loss.isfinite()
    assert result.scores.logprobs.isnan().nonzero().flatten().tolist() == [2]
    assert hidden_gradient.isnan().any(dim=-1).nonzero().flatten().tolist() == [2]
