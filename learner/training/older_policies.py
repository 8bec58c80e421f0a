"""Earlier weights of the policy that some losses compare with: the initial model, and the learner a few steps ago.

The copy changes places with the live weights for as long as it is used, tensor by tensor, so that it runs through the
same modules (hooks, packing, routing replay) and needs no second model.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class OlderPolicy:
    """A copy of a policy's weights."""

    def __init__(self, live: Mapping[str, Tensor]) -> None:
        """Copy `live`, whose tensors must stay the ones that the model computes with."""
        self._live = live
        self.weights = {name: tensor.detach().clone() for name, tensor in live.items()}

    @torch.no_grad()
    def refresh(self) -> None:
        """Become what the policy is now."""
        for name, tensor in self._live.items():
            self.weights[name].copy_(tensor)

    @contextmanager
    def in_place(self) -> Generator[None]:
        """The policy has this copy's weights inside, and its own, bit for bit, afterwards."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, tensor in self._live.items():
            kept = tensor.clone()
            tensor.copy_(self.weights[name])
            self.weights[name].copy_(kept)
