"""R3, rollout routing replay: train a mixture of experts with the choices that the engine made (arXiv 2510.11370).

Only the indices i are replaced. Gates g come from the live router's logits z, as each family makes them from its own
choice, so gradient reaches the router:

    Qwen3-MoE    p = softmax(z) in float32,  g = p[i], divided by sum p[i] where norm_topk_prob
    Mixtral      the same, always divided; equal to softmax(z[i]), softmax after top-k
    DeepSeek-V3  p = sigmoid(z) without the correction bias,  g = c p[i], p[i] divided by its sum where norm_topk_prob

    native: i = the router's top k    replay: i = recorded

DeepSeek-V3's groups and correction bias decide which experts are chosen, never their gates; c is its
routed_scaling_factor. The logits pass unchanged, so a load-balancing loss sees the native choice.

A forward hook on each router replaces its output. It finds its layer by the module it hangs on, and it fires again when
gradient checkpointing recomputes a layer, with the same indices, as long as the replay is active: keep it active
through the backward pass. Tokens without a record (the last token of a trajectory, padding) are routed natively.

A router family is one function in `_GATES`, by its Hugging Face class, and one row in leeway.huggingface.moe.

Shape legend: P places of a micro-batch, L MoE layers, k experts per token, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from leeway.errors import ConfigError, PreconditionError
from leeway.huggingface import moe

Gates = Callable[[nn.Module, Tensor, Tensor], Tensor]
RouterOutput = tuple[Tensor, Tensor, Tensor]  # logits [P, E], gates [P, k], experts [P, k]


def _softmax_before_topk(router: nn.Module, logits: Tensor, experts: Tensor) -> Tensor:
    """[P, k] gates of a router that takes its top k from a float32 softmax over all experts."""
    gates = torch.softmax(logits, dim=-1, dtype=torch.float32).gather(-1, experts)
    return gates / gates.sum(dim=-1, keepdim=True) if router.norm_topk_prob else gates


def _softmax_after_topk(router: nn.Module, logits: Tensor, experts: Tensor) -> Tensor:
    """[P, k] softmax(z[i]), computed as the model does: p[i] / sum p[i].

    Example:
        z = [0, 1, 3], i = [2, 0]: g = softmax([3, 0]) = [.9526, .0474].
    """
    gates = torch.softmax(logits.float(), dim=-1).gather(-1, experts)
    return gates / gates.sum(dim=-1, keepdim=True)


def _scaled_sigmoid(router: nn.Module, logits: Tensor, experts: Tensor) -> Tensor:
    """[P, k] gates of a sigmoid router whose bias takes part in the choice only.

    Example:
        z = [0, 2, -1], i = [0, 1], c = 2.5: p[i] = [.5, .8808], g = 2.5 p[i] / 1.3808 = [.9053, 1.5947].
    """
    gates = logits.sigmoid().gather(-1, experts)
    if router.norm_topk_prob:
        gates = gates / (gates.sum(dim=-1, keepdim=True) + 1e-20)
    return gates * cast("float", router.routed_scaling_factor)


_GATES: dict[str, Gates] = {
    "DeepseekV3TopkRouter": _scaled_sigmoid,
    "MixtralTopKRouter": _softmax_after_topk,
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
        for layer, (router, gates) in enumerate(routers):
            router.register_forward_hook(self._hook(layer, gates))

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
    named_modules = cast("Iterable[tuple[str, nn.Module]]", model.named_modules())
    return [(router, _GATES[family]) for family, router in moe.find_routers(named_modules)]
