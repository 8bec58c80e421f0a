"""R3, rollout routing replay: train a mixture of experts with the choices that the engine made (arXiv 2510.11370).

Only the indices are replaced. Gates come from the live router's dense softmax at the replayed experts, renormalised
as the model does, so gradient reaches the router:

    native:  p = softmax(router logits), i = top-k(p), g = p[i] / sum p[i]
    replay:  p = softmax(router logits), i = recorded, g = p[i] / sum p[i]

A forward hook on each router replaces its output. It finds its layer by the module it hangs on, and it fires again when
gradient checkpointing recomputes a layer, with the same indices, as long as the replay is active: keep it active
through the backward pass. Tokens without a record (the last token of a trajectory, padding) are routed natively.

A router family is one function in `_GATES`, under the name of its Hugging Face class.

Shape legend: P places of a micro-batch, L MoE layers, k experts per token, E experts, n tokens of a trajectory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from leeway.errors import ConfigError, InvalidDataError, PreconditionError
from leeway.types import ModelSignature, Trajectory

Gates = Callable[[nn.Module, Tensor, Tensor], Tensor]
RouterOutput = tuple[Tensor, Tensor, Tensor]  # logits [P, E], gates [P, k], experts [P, k]


def _softmax_before_topk(router: nn.Module, logits: Tensor, experts: Tensor) -> Tensor:
    """[P, k] gates of a router that takes its top k from a float32 softmax over all experts."""
    gates = torch.softmax(logits, dim=-1, dtype=torch.float32).gather(-1, experts)
    return gates / gates.sum(dim=-1, keepdim=True) if router.norm_topk_prob else gates


_GATES: dict[str, Gates] = {
    "Qwen3MoeTopKRouter": _softmax_before_topk,
}


class RoutingReplay:
    """Hooks on the routers of one model; without an active replay they change nothing."""

    def __init__(self, model: nn.Module) -> None:
        """Hook every known router of a model.

        Raises:
            ConfigError: the model has none; it is dense, or of a family that is not known here.
        """
        routers = find_routers(model)
        if not routers:
            raise ConfigError(
                f"{type(model).__name__} has no router whose choices can be replayed (known: {', '.join(_GATES)}); "
                "set learner.training.routing_replay = false"
            )
        self.num_layers = len(routers)
        self._routing: Tensor | None = None  # [P, L, k]
        self._routed: Tensor | None = None  # [P, 1]
        self._handles = [
            router.register_forward_hook(self._hook(layer, gates)) for layer, (router, gates) in enumerate(routers)
        ]

    @contextmanager
    def active(self, routing: Tensor, routed: Tensor) -> Generator[None]:
        """Replay for one micro-batch; forward and backward pass belong inside.

        Args:
            routing: [P, L, k] expert ids, valid wherever routed.
            routed: [P] bool, whether a place has a record.
        """
        self._routing, self._routed = routing, routed.unsqueeze(-1)
        try:
            yield
        finally:
            self._routing = self._routed = None

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, layer: int, gates: Gates) -> Callable[[nn.Module, object, RouterOutput], RouterOutput | None]:
        def replace(router: nn.Module, _inputs: object, output: RouterOutput) -> RouterOutput | None:
            if self._routing is None or self._routed is None:
                return None
            logits, native_gates, native_experts = output
            if logits.shape[0] != self._routing.shape[0]:
                raise PreconditionError(
                    f"MoE layer {layer} routes {logits.shape[0]} tokens while {self._routing.shape[0]} are replayed"
                )
            recorded = self._routing[:, layer].to(native_experts.dtype)
            experts = torch.where(self._routed, recorded, native_experts)
            return logits, gates(router, logits, experts).to(native_gates.dtype), experts

        return replace


def find_routers(model: nn.Module) -> list[tuple[nn.Module, Gates]]:
    """The model's routers in the order of their layers' numbers, each with the law of its gates."""
    found: list[tuple[list[int], nn.Module, Gates]] = []
    for name, module in cast("Iterable[tuple[str, nn.Module]]", model.named_modules()):
        for ancestor in type(module).__mro__:
            if ancestor.__name__ in _GATES:
                layer_numbers = [int(number) for number in re.findall(r"\d+", name)]
                found.append((layer_numbers, module, _GATES[ancestor.__name__]))
                break
    return [(module, gates) for _, module, gates in sorted(found, key=lambda item: item[0])]


def check_routing(trajectory: Trajectory, signature: ModelSignature) -> None:
    """Refuse routing that this model cannot have produced.

    Args:
        trajectory: routing [n - 1, L, k].
        signature: of the model, an MoE.

    Raises:
        InvalidDataError: missing, of another shape, an expert that does not exist, an expert twice for one token.
    """
    name = f"trajectory {trajectory.trajectory_id}"
    routing = trajectory.routing
    if routing is None:
        raise InvalidDataError(
            f"{name} has no routing; set sampling.routing = true or learner.training.routing_replay = false"
        )
    expected = (trajectory.num_tokens - 1, signature.moe_layers, signature.experts_per_token)
    if routing.shape != expected:
        raise InvalidDataError(
            f"{name} has routing of shape {list(routing.shape)} where [tokens - 1, layers, k] is {list(expected)}; "
            "it was recorded with another model, or rows are missing"
        )
    if routing.size == 0:
        return
    if int(routing.max()) >= signature.experts:
        raise InvalidDataError(f"{name} was routed to expert {int(routing.max())} of a model with {signature.experts}")
    ordered = np.sort(routing, axis=-1)
    repeated = (ordered[..., 1:] == ordered[..., :-1]).any(axis=-1)
    if repeated.any():
        token, layer = (int(place) for place in np.argwhere(repeated)[0])
        raise InvalidDataError(
            f"{name}: token {token} names an expert twice in MoE layer {layer}; its routing was not fully recorded"
        )
