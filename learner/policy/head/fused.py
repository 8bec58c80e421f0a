"""One pass from hidden states to loss and gradients, never holding a tokens x vocabulary matrix.

    hidden [T, H] ── chunk of C tokens ──> exponentials [C, V] ──> scores ──> loss ──> coefficients ──┐ same buffer
                                                                     zero ones leave here <───────────┤
    d loss / d hidden, d loss / d weight <── two matrix products of the tokens that are left <────────┘

A token-local loss knows d loss / d log pi as soon as its own logits are known, so the gradient is computed in the
forward pass and the logits are neither stored nor computed again: three matrix products for tokens with a gradient,
one for those without (masked, or advantage zero). The idea is that of Liger's fused linear cross entropy (arXiv
2410.10989), for losses that weigh every token.

    d loss / d logits = c (onehot(sampled) - p) / temperature,    c = d loss / d log pi

Weights may be stored in less than float32; products and sums are float32.

Shape legend: T tokens, C tokens of a chunk, H hidden size, V vocabulary, K further ids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from learner.policy.head import Head, Targets, TokenLoss, TokenScores, compute_dtype
from learner.policy.head.chunk import (
    ChunkSums,
    Coefficients,
    Gradients,
    Workspace,
    accumulate_exponentials,
    accumulate_gradients,
)

CHUNK_TOKENS = 384
"""Enough for matrix products to run at full speed; the buffer is this many rows of the vocabulary."""


@dataclass(frozen=True, slots=True)
class FusedResult:
    """Scores of all tokens and, where a loss was given, its value and gradients."""

    scores: TokenScores  # without gradient
    loss: Tensor | None  # scalar
    gradients: Gradients | None  # of that loss


@torch.no_grad()
def fused_head(
    hidden: Tensor,
    head: Head,
    targets: Targets,
    loss: TokenLoss | None = None,
    *,
    weight_gradient: Tensor | None = None,
    bias_gradient: Tensor | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> FusedResult:
    """Score tokens and, given a loss, differentiate it.

    Args:
        hidden: [T, H].
        head: the output layer.
        targets: T tokens.
        loss: token-local; called once per chunk. None only scores.
        weight_gradient: [V, H] of at least float32 to add d loss / d weight to; None leaves that gradient out.
        bias_gradient: [V] likewise.
        chunk_tokens: most tokens at once; memory is this many rows of the vocabulary.

    Returns:
        Scores and gradients of at least float32; d loss / d hidden of tokens whose coefficient is zero is exactly zero.

    Example:
        h = [1], W = [[0], [log 4]], temperature .5, sampled token 0, loss = -log pi = log 17: d loss / d h = 2 (16/17)
        log 4 = 2.60953.
    """
    dtype = compute_dtype(hidden, head.weight)
    num_tokens = targets.num_tokens
    size = _chunk_size(num_tokens, chunk_tokens)
    num_wanted = 1 if targets.topk_token_ids is None else 1 + targets.topk_token_ids.shape[1]
    wanted_logprobs = hidden.new_empty((num_tokens, num_wanted), dtype=dtype)
    entropies = hidden.new_empty(num_tokens, dtype=dtype)
    gradients = (
        None if loss is None else Gradients(torch.empty_like(hidden, dtype=dtype), weight_gradient, bias_gradient)
    )
    total_loss = None if loss is None else hidden.new_zeros((), dtype=dtype)
    space = Workspace(head, size, dtype, with_gradient=loss is not None)
    for start in range(0, num_tokens, size):
        places = slice(start, min(start + size, num_tokens))
        inverse_temperatures = targets.temperatures[places].to(dtype).reciprocal()
        cooled = hidden[places].to(dtype) * inverse_temperatures.unsqueeze(-1)
        sums = accumulate_exponentials(space, cooled, inverse_temperatures, targets.wanted(places))
        wanted_logprobs[places], entropies[places] = sums.wanted_logprobs, sums.entropies
        if loss is None or gradients is None or total_loss is None:
            continue
        chunk_loss, coefficients = _differentiate(loss, places, sums)
        total_loss += chunk_loss
        accumulate_gradients(
            space,
            cooled,
            inverse_temperatures,
            targets.token_ids[places],
            sums,
            coefficients,
            Gradients(gradients.hidden[places], gradients.weight, gradients.bias),
        )
    return FusedResult(_scores(wanted_logprobs, entropies), total_loss, gradients)


def _chunk_size(num_tokens: int, most: int) -> int:
    """Chunks of nearly the same size, so that none is too small for efficient products."""
    return max(1, math.ceil(num_tokens / max(1, math.ceil(num_tokens / most))))


def _scores(wanted_logprobs: Tensor, entropies: Tensor) -> TokenScores:
    top = wanted_logprobs[:, 1:] if wanted_logprobs.shape[1] > 1 else None
    return TokenScores(wanted_logprobs[:, 0], entropies, top)


def _differentiate(loss: TokenLoss, places: slice, sums: ChunkSums) -> tuple[Tensor, Coefficients]:
    """The loss of a chunk, and its derivatives by autograd over [C] numbers."""
    scores = _scores(sums.wanted_logprobs, sums.entropies)
    logprobs = scores.logprobs.clone().requires_grad_()
    entropies = scores.entropies.clone().requires_grad_()
    with torch.enable_grad():
        value = loss(places, TokenScores(logprobs, entropies, scores.topk_logprobs))
        if not value.requires_grad:
            return value, Coefficients(torch.zeros_like(logprobs), None)
        by_logprob, by_entropy = cast(
            "tuple[Tensor | None, Tensor | None]",
            torch.autograd.grad(value, (logprobs, entropies), allow_unused=True),
        )
    return value.detach(), Coefficients(torch.zeros_like(logprobs) if by_logprob is None else by_logprob, by_entropy)
