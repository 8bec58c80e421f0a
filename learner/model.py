"""Scores packed micro-batches with a Hugging Face causal language model.

The learner's one module that imports transformers.

Shape legend: R rows, W width, D hidden size, V vocabulary, N targets, K recorded candidates per target, S trajectories.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from learner.fused_head import fused_head
from learner.head import Head, Targets, TokenLoss, TokenScores
from learner.load_balancing import RouterLogits, load_balancing_losses
from learner.packing import MicroBatch
from learner.r3 import RoutingReplay
from learner.reference_head import scores_of_logits
from leeway.errors import ConfigError

HeadImplementation = Literal["fused", "reference"]


def _nothing(_further: Tensor | None) -> None:
    """There is no gradient to add."""


@dataclass(frozen=True, slots=True)
class Scores(TokenScores):
    """What the policy says about the N targets of a micro-batch and their K recorded candidates, in float32.

    Log-probs have a gradient of their own only from the reference head.
    """

    load_balancing: Tensor | None = None  # [S] float32 of each trajectory, with gradient; None where not wished
    backward: Callable[[Tensor | None], None] = _nothing
    """Adds the gradient of the loss that was given, and of a further scalar, to the parameters'; once."""


class PolicyModel:
    """A causal language model as the trainer uses it: no dropout, block-diagonal attention, logits for targets only."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        routing_replay: bool,
        gradient_checkpointing: bool,
        head: HeadImplementation = "reference",
        load_balancing: bool = False,
    ) -> None:
        """Wrap a model; it is changed in place.

        Raises:
            ConfigError: the model computes logits or attention in a way that packed scoring would not reproduce, or
                has no load-balancing loss where it is wished.
        """
        self.model = model.eval()
        self._replay = RoutingReplay(model) if routing_replay else None
        self._router_logits = RouterLogits(model) if load_balancing else None
        self._head = cast("nn.Module", model.get_output_embeddings())
        self._sliding_window = cast("int | None", getattr(model.config, "sliding_window", None))
        if cast("Any", model.config)._attn_implementation != "sdpa":
            raise ConfigError(f"{type(model).__name__} must attend with sdpa, which takes the mask of packed rows")
        if head == "fused" and type(self._head) is not nn.Linear:
            raise ConfigError(
                f'the output layer is a {type(self._head).__name__}; set learner.training.head = "reference"'
            )
        self._fused = head == "fused"
        self._check_head()
        if gradient_checkpointing:
            _enable_checkpointing(model)

    @property
    def longest_trajectory(self) -> int | None:
        """Tokens beyond which packed attention would differ from the model's own; None where there is no such limit."""
        return self._sliding_window

    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers by module name, tied ones once; the model's own memory."""
        tied = set(cast("Mapping[str, str]", self.model.all_tied_weights_keys or {}))
        return {name: tensor for name, tensor in self.model.state_dict().items() if name not in tied}

    @contextmanager
    def scored(self, batch: MicroBatch, loss: TokenLoss | None = None) -> Generator[Scores]:
        """Score a micro-batch; run its backward pass inside, while routing is still replayed.

        Args:
            batch: packed; its candidates, if it has any, are scored too.
            loss: what `backward` differentiates. The fused head needs it before it can tell a gradient; without one
                its scores have none.
        """
        with self._replaying(batch):
            places, load_balancing = self._forward(batch)  # [R * W, D], [S]
            hidden = places[torch.from_numpy(batch.target_places)]  # [N, D]
            targets = Targets(
                token_ids=torch.from_numpy(batch.target_token_ids),
                temperatures=torch.from_numpy(batch.temperatures),
                topk_token_ids=None if batch.topk_token_ids is None else torch.from_numpy(batch.topk_token_ids),
            )
            scores = self._fused_scores(hidden, targets, loss) if self._fused else self._scores(hidden, targets, loss)
            yield replace(scores, load_balancing=load_balancing)

    def _scores(self, hidden: Tensor, targets: Targets, loss: TokenLoss | None) -> Scores:
        scores = scores_of_logits(self._head(hidden).float(), targets)

        def backward(further: Tensor | None) -> None:
            _backward([] if loss is None else [(loss(slice(None), scores), None)], further)

        return Scores(scores.logprobs, scores.entropies.detach(), scores.topk_logprobs, backward=backward)

    def _fused_scores(self, hidden: Tensor, targets: Targets, loss: TokenLoss | None) -> Scores:
        linear = cast("nn.Linear", self._head)
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

        def backward(further: Tensor | None) -> None:
            _add_gradient(linear.weight, weight_gradient)
            _add_gradient(bias, bias_gradient)
            gradients = result.gradients
            _backward([] if gradients is None else [(hidden, gradients.hidden.to(hidden.dtype))], further)

        scores = result.scores
        return Scores(scores.logprobs, scores.entropies, scores.topk_logprobs, backward=backward)

    def _replaying(self, batch: MicroBatch) -> AbstractContextManager[None]:
        if self._replay is None or batch.routing is None or batch.routed is None:
            return nullcontext()
        return self._replay.active(torch.from_numpy(batch.routing), torch.from_numpy(batch.routed))

    def _forward(self, batch: MicroBatch) -> tuple[Tensor, Tensor | None]:
        """Hidden states of every place, and the load-balancing loss of every trajectory where it is wished."""
        if self._router_logits is None:
            return self._hidden(batch), None
        with self._router_logits.kept() as logits:
            hidden = self._hidden(batch)
        sequences, count = batch.place_sequences()
        experts_per_token = self._router_logits.experts_per_token
        return hidden, load_balancing_losses(logits.values(), torch.from_numpy(sequences), count, experts_per_token)

    def _hidden(self, batch: MicroBatch) -> Tensor:
        # A row with one trajectory needs no mask: plain causal attention never looks at the padding behind it.
        packed = bool((batch.segment_ids > 0).any())
        output = self.model.base_model(
            input_ids=torch.from_numpy(batch.token_ids),
            attention_mask=torch.from_numpy(attention_mask(batch.segment_ids)) if packed else None,
            position_ids=torch.from_numpy(batch.position_ids) if packed else None,
            use_cache=False,
        )
        return cast("Tensor", output.last_hidden_state).flatten(0, 1)

    @torch.no_grad()
    def _check_head(self) -> None:
        """Some models scale or cap their logits after the head; scoring applies the head alone."""
        token = torch.zeros((1, 1), dtype=torch.int64)
        hidden = self.model.base_model(input_ids=token, use_cache=False).last_hidden_state
        if not torch.equal(self._head(hidden), cast("Any", self.model)(input_ids=token, use_cache=False).logits):
            raise ConfigError(
                f"{type(self.model).__name__} changes its logits after the output layer; it cannot be trained"
            )


def attention_mask(segment_ids: NDArray[np.int32]) -> NDArray[np.bool_]:
    """True where a query may look: at its own segment, not ahead. Padding looks at padding, so that no row is empty.

    Args:
        segment_ids: [R, W].

    Returns:
        [R, 1, W, W] bool, queries before keys.

    Example:
        segments [0, 0, 1]: the second token sees the first and itself, the third only itself.
    """
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    mask: NDArray[np.bool_] = np.tril(same)[:, None]
    return mask


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


def _backward(roots: list[tuple[Tensor, Tensor | None]], further: Tensor | None) -> None:
    """One backward pass from tensors with their gradients and from a further scalar, over the graph they share."""
    if further is not None:
        roots = [*roots, (further, None)]
    roots = [(root, gradient) for root, gradient in roots if root.requires_grad]
    if roots:
        torch.autograd.backward([root for root, _ in roots], [gradient for _, gradient in roots])


def _enable_checkpointing(model: PreTrainedModel) -> None:
    if not model.supports_gradient_checkpointing:
        raise ConfigError(
            f"{type(model).__name__} has no gradient checkpointing; set learner.training.gradient_checkpointing = false"
        )
    model.activation_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            # transformers recomputes only layers in training mode; what they contain stays in evaluation mode: no
            # dropout.
            module.training = True
