"""Data types of the output head: its weights, its targets and its scores.

There are two implementations: the reference in `output`, by plain autograd, and `fused`, one pass in chunks.

Shape legend: T tokens, H hidden size, V vocabulary, K extra ids per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Head:
    """The linear layer from hidden states to logits."""

    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]

    @property
    def vocabulary_size(self) -> int:
        return self.weight.shape[0]


@dataclass(frozen=True, slots=True)
class Targets:
    """The tokens that the head scores."""

    token_ids: Tensor  # [T] int64, the sampled tokens
    temperatures: Tensor  # [T] float32, positive; logits are divided by them
    topk_token_ids: Tensor | None = None  # [T, K] int64, further ids whose log-probs are wanted

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    def wanted(self, places: slice) -> Tensor:
        """[C, 1 + K] ids of some tokens, the sampled one first."""
        sampled = self.token_ids[places].unsqueeze(-1)
        return sampled if self.topk_token_ids is None else torch.cat([sampled, self.topk_token_ids[places]], dim=-1)


@dataclass(frozen=True, slots=True)
class TokenScores:
    """The policy's scores of tokens, at the sampling temperature; at least float32."""

    logprobs: Tensor  # [T] log pi of the sampled tokens
    entropies: Tensor  # [T] of the same distributions
    topk_logprobs: Tensor | None = None  # [T, K] log pi of the further ids; decides, and has no gradient

    def detached(self) -> TokenScores:
        """The same numbers without gradient."""
        return TokenScores(self.logprobs.detach(), self.entropies.detach(), self.topk_logprobs)


TokenLoss = Callable[[slice, TokenScores], Tensor]
"""The summed loss of the tokens at `places`, from their scores: a scalar, differentiable in log-probs and entropies.

It is token-local: the sum over pieces is the loss of the whole. What a loss needs to know about whole sequences is
computed before, from scores without gradient.
"""


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Float64 where a tensor is; else float32, whatever the weights are stored as."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
