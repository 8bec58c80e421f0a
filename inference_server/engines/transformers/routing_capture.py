"""Records the experts that each MoE layer chose, at its router.

A forward hook on every router keeps the chosen indices of the forward that has just run, in slot order. Routers are
bound by module, in the order of their layers' numbers. `take` hands a forward's rows out once: a forward that did not
pass through every layer is an error, never a repeat of older rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final, cast

import numpy as np
import torch

from leeway.huggingface.moe import find_routers
from leeway.types import Array

_EXPERTS: Final = 2  # of what a router returns: logits, gates, experts


class RoutingCapture:
    """Records the routing of a model of a known family; `num_layers` is 0 for one without known routers."""

    def __init__(self, model: torch.nn.Module) -> None:
        named_modules = cast("Iterable[tuple[str, Any]]", model.named_modules())
        routers = [router for _, router in find_routers(named_modules)]
        self.num_layers = len(routers)
        self.experts_per_token = int(routers[0].top_k) if routers else 0
        num_experts = int(routers[0].num_experts) if routers else 0
        self.dtype: np.dtype[Any] = np.dtype(np.uint8 if num_experts <= 256 else np.uint16)
        self._captured: dict[int, torch.Tensor] = {}
        for layer, router in enumerate(routers):
            router.register_forward_hook(self._hook(layer))

    def take(self) -> Array:
        """Expert ids of the last forward, [tokens, layers, k], in the order in which the forward saw its tokens.

        Raises:
            RuntimeError: the forward did not pass through every router.
        """
        captured = [self._captured.pop(layer, None) for layer in range(self.num_layers)]
        present = [indices for indices in captured if indices is not None]
        if len(present) != self.num_layers:
            raise RuntimeError(
                f"routing of {self.num_layers - len(present)} of {self.num_layers} MoE layers is missing"
            )
        return torch.stack(present, dim=1).numpy().astype(self.dtype)

    def discard(self) -> None:
        """Forget the last forward."""
        self._captured.clear()

    def _hook(self, layer: int) -> Callable[[torch.nn.Module, tuple[Any, ...], tuple[torch.Tensor, ...]], None]:
        def keep(module: torch.nn.Module, args: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
            self._captured[layer] = output[_EXPERTS]

        return keep
