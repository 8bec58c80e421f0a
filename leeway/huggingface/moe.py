"""The mixture-of-experts families: how transformers configures, names and fuses them. Needs no torch.

One row of `FAMILIES` per Hugging Face model type. A router is a module whose forward returns (logits [T, E], gates
[T, k], experts [T, k]), found by its class and put in order by its layer's number, never by its place in a list: a
model may have dense layers among its MoE layers.

Shape legend: T tokens, E experts, k experts per token.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, TypeVar

_ModuleT = TypeVar("_ModuleT")


@dataclass(frozen=True, slots=True)
class MoeShape:
    """The shape of a token's routing; all 0 for a dense model."""

    layers: int
    experts: int
    experts_per_token: int


def _qwen_layers(config: object) -> int:
    dense = frozenset[int](getattr(config, "mlp_only_layers", None) or ())
    every = int(getattr(config, "decoder_sparse_step", 1))
    return sum(layer not in dense and (layer + 1) % every == 0 for layer in range(_number(config, "num_hidden_layers")))


def _mixtral_layers(config: object) -> int:
    return _number(config, "num_hidden_layers")


def _deepseek_layers(config: object) -> int:
    return max(_number(config, "num_hidden_layers") - _number(config, "first_k_dense_replace"), 0)


def _number(config: object, name: str) -> int:
    return int(getattr(config, name) or 0)


@dataclass(frozen=True, slots=True)
class MoeFamily:
    """One model type with fused experts."""

    num_layers: Callable[[object], int]  # MoE layers of a configuration
    experts: str  # the configuration's name for how many experts a layer has
    router: str | None  # class of the routers; None where routing is neither recorded nor replayed
    block: str = "mlp"  # a checkpoint's name for the module `mlp` of an MoE layer
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")  # a checkpoint's names for an expert's


FAMILIES: Final[dict[str, MoeFamily]] = {
    "deepseek_v3": MoeFamily(_deepseek_layers, "n_routed_experts", "DeepseekV3TopkRouter"),
    "mixtral": MoeFamily(
        _mixtral_layers, "num_local_experts", "MixtralTopKRouter", "block_sparse_moe", ("w1", "w3", "w2")
    ),
    "olmoe": MoeFamily(_qwen_layers, "num_experts", None),
    "qwen2_moe": MoeFamily(_qwen_layers, "num_experts", None),
    "qwen3_moe": MoeFamily(_qwen_layers, "num_experts", "Qwen3MoeTopKRouter"),
}

ROUTERS: Final = frozenset(family.router for family in FAMILIES.values() if family.router is not None)


def moe_shape(config: object) -> MoeShape:
    """MoE layers, experts and experts per token of a transformers configuration.

    Example:
        DeepSeek-V3 with 61 layers, the first 3 of them dense, 256 experts, 8 per token: MoeShape(58, 256, 8).
    """
    family = FAMILIES.get(getattr(config, "model_type", ""))
    experts = _number(config, family.experts) if family is not None else 0
    layers = family.num_layers(config) if family is not None and experts else 0
    return MoeShape(layers, experts, _number(config, "num_experts_per_tok")) if layers else MoeShape(0, 0, 0)


def find_routers(named_modules: Iterable[tuple[str, _ModuleT]]) -> list[tuple[str, _ModuleT]]:
    """A model's routers, each with the name of its class here, in the order of their layers' numbers.

    Args:
        named_modules: what `model.named_modules()` gives. A subclass of a router is one.
    """
    found: list[tuple[list[int], str, _ModuleT]] = []
    for name, module in named_modules:
        router = next((base.__name__ for base in type(module).__mro__ if base.__name__ in ROUTERS), None)
        if router is not None:
            found.append(([int(number) for number in re.findall(r"\d+", name)], router, module))
    return [(router, module) for _, router, module in sorted(found, key=lambda item: item[0])]


def checkpoint_name(model_type: str, name: str) -> str:
    """The name that a parameter of a transformers module has in a checkpoint, experts aside.

    Example:
        mixtral: model.layers.0.mlp.gate.weight -> model.layers.0.block_sparse_moe.gate.weight
    """
    family = FAMILIES.get(model_type)
    return name if family is None else name.replace(".mlp.", f".{family.block}.")
