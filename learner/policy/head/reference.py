"""The output head by plain autograd, for tests to compare with and for heads that are more than a matrix product.

It holds several [T, V] matrices until the backward pass is over; `fused` gives the same numbers without.
"""

from __future__ import annotations

import torch
from torch import Tensor

from learner.policy.head import Head, Targets, TokenScores, compute_dtype


def reference_head(hidden: Tensor, head: Head, targets: Targets) -> TokenScores:
    """Score tokens from hidden states [T, H]: log pi = log_softmax((h W^T + b) / temperature).

    Returns:
        Scores with gradient, except the further ids.

    Example:
        h W^T = [0, log 4], temperature .5, sampled token 0: log pi = log(1/17).
    """
    dtype = compute_dtype(hidden, head.weight)
    logits = hidden.to(dtype) @ head.weight.to(dtype).T  # [T, V]
    return scores_of_logits(logits if head.bias is None else logits + head.bias.to(dtype), targets)


def scores_of_logits(logits: Tensor, targets: Targets) -> TokenScores:
    """Score tokens from logits [T, V] of at least float32, before the temperature."""
    logprobs = torch.log_softmax(logits / targets.temperatures.to(logits.dtype).unsqueeze(-1), dim=-1)
    top = None if targets.topk_token_ids is None else logprobs.detach().gather(-1, targets.topk_token_ids)
    return TokenScores(
        logprobs.gather(-1, targets.token_ids.unsqueeze(-1)).squeeze(-1),
        -(logprobs.exp() * logprobs).sum(dim=-1),  # entr would have no gradient where a probability is below the dtype
        top,
    )
