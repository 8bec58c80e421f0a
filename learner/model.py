"""Scores packed micro-batches with a Hugging Face causal language model.

The learner's one module that imports transformers.

Shape legend: R rows, W width, D hidden size, V vocabulary, N targets, K recorded candidates per target, S trajectories.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from learner.load_balancing import RouterLogits, load_balancing_losses
from learner.packing import MicroBatch
from learner.r3 import RoutingReplay
from leeway.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Scores:
    """What the policy says about the targets of a micro-batch."""

    logprobs: Tensor  # [N] float32 log pi at the sampling temperature, with gradient
    entropies: Tensor  # [N] float32, of the same distribution, with gradient where asked for
    topk_logprobs: Tensor | None = None  # [N, K] float32 log pi of the recorded candidates, without gradient
    load_balancing: Tensor | None = None  # [S] float32 of each trajectory, with gradient; None where not wished


class PolicyModel:
    """A causal language model as the trainer uses it: no dropout, block-diagonal attention, logits for targets only."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        routing_replay: bool,
        gradient_checkpointing: bool,
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
    def scored(self, batch: MicroBatch, *, entropy_gradient: bool = False) -> Generator[Scores]:
        """Score a micro-batch; run its backward pass inside, while routing is still replayed.

        Args:
            batch: packed; its candidates, if it has any, are scored too.
            entropy_gradient: whether the entropies are differentiable.
        """
        with self._replaying(batch):
            hidden, load_balancing = self._forward(batch)  # [R * W, D], [S]
            logits = self._head(hidden[torch.from_numpy(batch.target_places)]).float()  # [N, V]
            logits = logits / torch.from_numpy(batch.temperatures).unsqueeze(-1)
            logprobs = torch.log_softmax(logits, dim=-1)
            targets = torch.from_numpy(batch.target_token_ids).unsqueeze(-1)
            candidates = batch.topk_token_ids
            yield Scores(
                logprobs.gather(-1, targets).squeeze(-1),
                _differentiable_entropy(logprobs) if entropy_gradient else _entropy(logprobs.detach()),
                None if candidates is None else logprobs.detach().gather(-1, torch.from_numpy(candidates)),
                load_balancing,
            )

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


def _entropy(logprobs: Tensor) -> Tensor:
    """[N] entropy of rows of log-probabilities [N, V], with 0 log 0 = 0."""
    return cast("Tensor", torch.special.entr(logprobs.exp()).sum(dim=-1))


def _differentiable_entropy(logprobs: Tensor) -> Tensor:
    """[N] the same, with a finite gradient where a probability is 0."""
    return -(logprobs.exp() * logprobs).sum(dim=-1)


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
