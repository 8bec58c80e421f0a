"""A model's output layer as the trainer asks it: by one of two implementations.

The fused one adds the gradient of its own parameters while it goes through the tokens, and hands over that of the
hidden states. The reference leaves all of that to autograd and takes any layer, but holds several [N, V] matrices until
the backward pass is over.

Shape legend: N targets, D hidden size, V vocabulary, K recorded candidates per target.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from learner.policy.head import Head, Targets, TokenLoss, TokenScores
from learner.policy.head.fused import fused_head
from leeway.errors import ConfigError

HeadImplementation = Literal["fused", "reference"]


class HeadAnswer(NamedTuple):
    """Scores of N targets, and where the backward pass begins."""

    logprobs: Tensor  # [N]
    entropies: Tensor  # [N]
    topk_logprobs: Tensor | None  # [N, K]
    root: Tensor | None  # the loss, or the fused head's hidden states [N, D]; None without a loss
    root_gradient: Tensor | None  # [N, D] of the hidden states


class OutputHead:
    """The layer from hidden states to logits.

    Raises:
        ConfigError: the layer is more than a matrix product, which is all that the fused implementation knows.
    """

    def __init__(self, module: nn.Module, implementation: HeadImplementation) -> None:
        if implementation == "fused" and type(module) is not nn.Linear:
            raise ConfigError(f'the output layer is a {type(module).__name__}; set learner.training.head = "reference"')
        self.module = module
        self._fused = implementation == "fused"

    def answer(
        self,
        hidden: Tensor,
        targets: Targets,
        loss: TokenLoss | None,
        precision: Callable[[], AbstractContextManager[object]],
    ) -> HeadAnswer:
        """Score the targets from their hidden states [N, D]; the reference multiplies in `precision`."""
        if self._fused:
            return self._fused_answer(hidden, targets, loss)
        with precision():
            logits = self.module(hidden)  # [N, V]
        scores = scores_of_logits(logits.float(), targets)
        root = None if loss is None else loss(slice(None), scores)
        logprobs = scores.logprobs.clone()  # FSDP wants no views
        return HeadAnswer(logprobs, scores.entropies.detach(), scores.topk_logprobs, root, None)

    def _fused_answer(self, hidden: Tensor, targets: Targets, loss: TokenLoss | None) -> HeadAnswer:
        linear = cast("nn.Linear", self.module)
        bias = cast("Tensor | None", linear.bias)
        weight_gradient = None if loss is None else _room_for_gradient(linear.weight)
        bias_gradient = None if loss is None or bias is None else _room_for_gradient(bias)
        result = fused_head(
            hidden.detach(),
            Head(linear.weight.detach(), None if bias is None else bias.detach()),
            targets,
            loss,
            weight_gradient=weight_gradient,
            bias_gradient=bias_gradient,
        )
        _add_gradient(linear.weight, weight_gradient)
        _add_gradient(bias, bias_gradient)
        scores, gradients = result.scores, result.gradients
        return HeadAnswer(
            scores.logprobs,
            scores.entropies,
            scores.topk_logprobs,
            None if gradients is None else hidden,
            None if gradients is None else gradients.hidden.to(hidden.dtype),
        )


def _room_for_gradient(parameter: Tensor) -> Tensor | None:
    """Where the head adds a parameter's gradient: its own, or float32 where that is less. None for a frozen one."""
    if not parameter.requires_grad:
        return None
    if torch.finfo(parameter.dtype).bits < 32:
        return torch.zeros_like(parameter, dtype=torch.float32)
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _add_gradient(parameter: Tensor | None, gradient: Tensor | None) -> None:
    """Hand over what is not there yet."""
    if parameter is None or gradient is None or gradient is parameter.grad:
        return
    if parameter.grad is None:
        parameter.grad = gradient.to(parameter.dtype)
    else:
        parameter.grad += gradient


def scores_of_logits(logits: Tensor, targets: Targets) -> TokenScores:
    """Score tokens from logits [T, V] of at least float32, before the temperature."""
    logprobs = torch.log_softmax(logits / targets.temperatures.to(logits.dtype).unsqueeze(-1), dim=-1)
    top = None if targets.topk_token_ids is None else logprobs.detach().gather(-1, targets.topk_token_ids)
    return TokenScores(
        logprobs.gather(-1, targets.token_ids.unsqueeze(-1)).squeeze(-1),
        -(logprobs.exp() * logprobs).sum(dim=-1),  # entr would have no gradient where a probability is below the dtype
        top,
    )
