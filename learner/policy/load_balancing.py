"""The auxiliary load-balancing loss of softmax routers (Switch Transformer, arXiv 2101.03961, equations 4 to 6).

    aux = E sum_e f_e P_e

f_e is the share of a trajectory's tokens, over all MoE layers, whose native top k holds expert e (so sum_e f_e = k);
P_e is the mean of their router probability of e, and alone carries gradient. Native means the live router's choice from
its own logits, whatever routing is replayed: it is the router that is to be balanced. For a single trajectory this is
transformers' `load_balancing_loss_func`. A step takes the mean over its trajectories: products of batch-wide means
would change with how the step is cut into micro-batches or spread over ranks.

Shape legend: P places of a micro-batch, L MoE layers, E experts, k experts per token, S trajectories of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from leeway.errors import ConfigError
from leeway.huggingface.moe import find_routers

_BALANCED = ("MixtralTopKRouter", "Qwen3MoeTopKRouter")


class RouterLogits:
    """Keeps the logits of each MoE layer of a forward pass, with their gradient."""

    def __init__(self, model: nn.Module) -> None:
        """Hook a model's routers.

        Raises:
            ConfigError: the model has no load-balancing loss: it is dense, or balances its experts otherwise.
        """
        routers = find_routers(cast("Iterable[tuple[str, nn.Module]]", model.named_modules()))
        if not routers or any(family not in _BALANCED for family, _ in routers):
            raise ConfigError(
                f"{type(model).__name__} has no load-balancing loss (known: {', '.join(_BALANCED)}); "
                "set learner.training.load_balancing = 0"
            )
        self.experts_per_token = cast("int", routers[0][1].top_k)
        self._kept: dict[int, Tensor] | None = None
        for layer, (_, router) in enumerate(routers):
            router.register_forward_hook(self._hook(layer))

    @contextmanager
    def kept(self) -> Generator[dict[int, Tensor]]:
        """Filled by one forward pass, [P, E] by MoE layer; to end before the backward pass, which runs layers again."""
        self._kept = {}
        try:
            yield self._kept
        finally:
            self._kept = None

    def _hook(self, layer: int) -> Callable[[nn.Module, object, tuple[Tensor, ...]], None]:
        def keep(_router: nn.Module, _inputs: object, output: tuple[Tensor, ...]) -> None:
            if self._kept is not None:
                self._kept[layer] = output[0]

        return keep


def load_balancing_losses(
    logits: Iterable[Tensor], sequences: Tensor, num_sequences: int, experts_per_token: int
) -> Tensor:
    """E sum_e f_e P_e of each trajectory.

    Args:
        logits: L router logits, [P, E] each.
        sequences: [P] int64, which of the S trajectories a place belongs to; -1 at padding.
        num_sequences: S.
        experts_per_token: k.

    Returns:
        [S] float32; k for a perfectly balanced router, up to E for a collapsed one.

    Example:
        One layer, k = 1, two tokens with probabilities [.8, .2] and [.6, .4]: f = [1, 0], P = [.7, .3], aux = 1.4.
    """
    real = sequences >= 0
    owners = sequences[real]
    chosen: Tensor | None = None
    probabilities: Tensor | None = None
    layers = 0
    for layer in logits:
        p = torch.softmax(layer[real].float(), dim=-1)
        native = torch.zeros_like(p).scatter_(-1, p.detach().topk(experts_per_token, dim=-1).indices, 1.0)
        empty = p.new_zeros((num_sequences, p.shape[-1]))
        chosen = empty.index_add(0, owners, native) + (0 if chosen is None else chosen)
        probabilities = empty.index_add(0, owners, p) + (0 if probabilities is None else probabilities)
        layers += 1
    assert chosen is not None
    assert probabilities is not None
    rows = layers * torch.bincount(owners, minlength=num_sequences).unsqueeze(-1)
    return chosen.shape[-1] * (chosen / rows * (probabilities / rows)).sum(dim=-1)
