"""Scores packed micro-batches with a Hugging Face causal language model.

The learner's one module that imports transformers.

Shape legend: R rows, W width, D hidden size, V vocabulary, N targets, K recorded candidates per target, S trajectories.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from learner.batch.packing import MicroBatch
from learner.policy.head import Targets, TokenLoss, TokenScores
from learner.policy.head.output import HeadAnswer, HeadImplementation, OutputHead
from learner.policy.load_balancing import RouterLogits, load_balancing_losses
from learner.policy.lora import add_adapters, is_adapter, merged_weights
from learner.policy.r3 import RoutingReplay
from leeway.config import LoraOptions
from leeway.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores(TokenScores):
    """The policy's scores of a micro-batch's N targets and their K recorded candidates, in float32.

    Log-probs have a gradient of their own only from the reference head.
    """

    load_balancing: Tensor | None  # [S] float32 of each trajectory, with gradient; None where not wished
    backward: Callable[[Tensor | None], None]
    """Adds the gradient of the loss that was given, and of a further scalar, to the parameters'; once."""


class _Forward(NamedTuple):
    """The result of a forward pass: a tuple, since FSDP looks through outputs for those with a gradient."""

    head: HeadAnswer
    load_balancing: Tensor | None  # [S]


_InForward = Callable[[Callable[[], _Forward]], _Forward]


def _call(compute: Callable[[], _Forward]) -> _Forward:
    return compute()


class PolicyModel:
    """A causal language model as the trainer uses it: no dropout, block-diagonal attention, logits for targets only."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        routing_replay: bool,
        gradient_checkpointing: bool,
        head: HeadImplementation = "reference",
        compute_dtype: torch.dtype = torch.float32,
        lora: LoraOptions | None = None,
        load_balancing: bool = False,
    ) -> None:
        """Wrap a model; it is changed in place.

        Raises:
            ConfigError: the model computes logits or attention in a way that packed scoring would not reproduce, or
                has no load-balancing loss where it is wished.
        """
        self.model = model.eval()
        self._compute_dtype = compute_dtype
        self._replay = RoutingReplay(model) if routing_replay else None
        self._router_logits = RouterLogits(model) if load_balancing else None
        self._head = OutputHead(cast("nn.Module", model.get_output_embeddings()), head)
        self._sliding_window = cast("int | None", getattr(model.config, "sliding_window", None))
        if cast("Any", model.config)._attn_implementation != "sdpa":
            raise ConfigError(f"{type(model).__name__} must attend with sdpa, which takes the mask of packed rows")
        self._check_head()
        self._adapted = lora is not None
        if lora is not None:
            add_adapters(model, self._head.module, lora)
        if gradient_checkpointing:
            _enable_checkpointing(model)
        self._in_forward: _InForward = _call

    def shard(self, mesh: DeviceMesh) -> None:
        """Shard the weights over the ranks of a mesh (FSDP2), layer by layer; gradients are sums over the ranks.

        Afterwards every rank scores equally many micro-batches, or the others wait for it.
        """
        layers = cast("Iterable[nn.Module]", getattr(self.model.base_model, "layers", ()))
        for module in (*layers, self.model):
            sharded = fully_shard(module, mesh=mesh, reshard_after_forward=True)
            # Losses are weighted by the counts of the whole step.
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)  # what gloo can
        # Scoring runs parts of the model by themselves; FSDP has to see that as the model's forward pass.
        model = cast("Any", self.model)
        model.run_in_forward = _call
        register_fsdp_forward_method(self.model, "run_in_forward")
        self._in_forward = cast("_InForward", model.run_in_forward)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.model.device

    @property
    def longest_trajectory(self) -> int | None:
        """Tokens beyond which packed attention would differ from the model's own; None where there is no such limit."""
        return self._sliding_window

    def weights(self) -> dict[str, Tensor]:
        """Parameters that training changes, and buffers, by module name, tied ones once; the model's own memory.

        With adapters these alone: the rest stays what model.path holds.
        """
        return {
            name: tensor
            for name, tensor in self.model.state_dict().items()
            if name not in self._tied and (is_adapter(name) or not self._adapted)
        }

    def merged_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The model as a plain one has it: tied weights once, adapters merged, sharded tensors whole, one at a time."""
        return ((name, tensor) for name, tensor in merged_weights(self.model) if name not in self._tied)

    @property
    def _tied(self) -> set[str]:
        return set(cast("Mapping[str, str]", self.model.all_tied_weights_keys or {}))

    @contextmanager
    def scored(self, batch: MicroBatch, loss: TokenLoss | None = None) -> Generator[Scores]:
        """Score a micro-batch; run its backward pass inside, while routing is still replayed.

        Args:
            batch: packed; its candidates, if it has any, are scored too.
            loss: what `backward` differentiates. The fused head adds its own parameters' gradient at once, before
                `backward` goes on through the layers.
        """
        with self._replaying(batch):
            head, load_balancing = self._in_forward(lambda: self._score(batch, loss))

            def backward(further: Tensor | None) -> None:
                _backward([(head.root, head.root_gradient), (further, None)])

            yield Scores(
                logprobs=head.logprobs,
                entropies=head.entropies,
                topk_logprobs=head.topk_logprobs,
                load_balancing=load_balancing,
                backward=backward,
            )

    def _score(self, batch: MicroBatch, loss: TokenLoss | None) -> _Forward:
        targets = Targets(
            token_ids=self._tensor(batch.target_token_ids),
            temperatures=self._tensor(batch.temperatures),
            topk_token_ids=None if batch.topk_token_ids is None else self._tensor(batch.topk_token_ids),
        )
        with self._precision():
            places, load_balancing = self._forward(batch)  # [R * W, D], [S]
            hidden = places[self._tensor(batch.target_places)]  # [N, D]
        return _Forward(self._head.answer(hidden, targets, loss, self._precision), load_balancing)

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def _replaying(self, batch: MicroBatch) -> AbstractContextManager[None]:
        if self._replay is None or batch.routing is None or batch.routed is None:
            return nullcontext()
        return self._replay.active(self._tensor(batch.routing), self._tensor(batch.routed))

    def _precision(self) -> AbstractContextManager[object]:
        """Matrix products in the compute type; float32 weights are cast where they are used."""
        if self._compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self._compute_dtype)

    def _forward(self, batch: MicroBatch) -> tuple[Tensor, Tensor | None]:
        """Hidden states of every place, and the load-balancing loss of every trajectory where it is wished."""
        if self._router_logits is None:
            return self._hidden(batch), None
        with self._router_logits.kept() as logits:
            hidden = self._hidden(batch)
        sequences, count = batch.place_sequences()
        experts_per_token = self._router_logits.experts_per_token
        return hidden, load_balancing_losses(logits.values(), self._tensor(sequences), count, experts_per_token)

    def _hidden(self, batch: MicroBatch) -> Tensor:
        # A row with one trajectory needs no mask: plain causal attention never looks at the padding behind it.
        packed = bool((batch.segment_ids > 0).any())
        output = self.model.base_model(
            input_ids=self._tensor(batch.token_ids),
            attention_mask=self._tensor(attention_mask(batch.segment_ids)) if packed else None,
            position_ids=self._tensor(batch.position_ids) if packed else None,
            use_cache=False,
        )
        return cast("Tensor", output.last_hidden_state).flatten(0, 1)

    @torch.no_grad()
    def _check_head(self) -> None:
        """Some models scale or cap their logits after the head; scoring applies the head alone."""
        token = torch.zeros((1, 1), dtype=torch.int64, device=self.device)
        hidden = self.model.base_model(input_ids=token, use_cache=False).last_hidden_state
        if not torch.equal(self._head.module(hidden), cast("Any", self.model)(input_ids=token, use_cache=False).logits):
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


def _backward(roots: Iterable[tuple[Tensor | None, Tensor | None]]) -> None:
    """One backward pass from tensors with their gradients, over the graph they share."""
    live = [(root, gradient) for root, gradient in roots if root is not None and root.requires_grad]
    if live:
        torch.autograd.backward([root for root, _ in live], [gradient for _, gradient in live])


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
