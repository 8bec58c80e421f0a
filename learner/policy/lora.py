"""LoRA: low-rank adapters beside frozen linear layers (arXiv 2106.09685), through peft.

    y = W x + (alpha / r) B A x        A [r, in] random, B [out, r] zero: the first step starts from the model itself

Only A and B are trained and saved. What is published, and exported, is W + (alpha / r) B A, merged tensor by tensor
into copies, so that engines need to know nothing of adapters and the base never drifts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from learner.policy import whole
from leeway.config import LoraOptions
from leeway.errors import ConfigError

_ADAPTER = "default"
_BASE = ".base_layer."


def add_adapters(model: nn.Module, output_layer: nn.Module | None, options: LoraOptions) -> None:
    """Put adapters beside the chosen linear layers, in place, and freeze everything else.

    Args:
        model: with its weights.
        output_layer: the one that gives logits; it cannot have an adapter.
        options: which layers, and how.

    Raises:
        ConfigError: peft is not installed, or a target has no layer that can have an adapter.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError("learner.training.lora needs peft; install it with: pip install 'leeway[lora]'") from error
    _check_targets(model, output_layer, options)
    configuration = LoraConfig(
        r=options.rank,
        lora_alpha=cast("int", options.alpha),  # peft computes with a float as well
        target_modules=list(options.targets),
        lora_dropout=0.0,
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        inject_adapter_in_model(configuration, model, adapter_name=_ADAPTER)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))


def is_adapter(name: str) -> bool:
    """True for a tensor of an adapter, by its name in the model's state."""
    return ".lora_" in name


@torch.no_grad()
def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The model's state with adapters merged, one whole tensor at a time, under the names that it has without them."""
    for name, tensor in model.state_dict().items():
        if is_adapter(name):
            continue
        if _BASE not in name:
            yield name, whole(tensor)
            continue
        prefix, _, last = name.rpartition(_BASE)
        merged = whole(tensor)
        if last == "weight":
            merged = merged + _delta(model.get_submodule(prefix))
        yield f"{prefix}.{last}", merged


def _delta(layer: nn.Module) -> Tensor:
    """[out, in] what the adapter adds to the layer's weight, in float32."""
    adapted = cast("Any", layer)
    a, b = whole(adapted.lora_A[_ADAPTER].weight), whole(adapted.lora_B[_ADAPTER].weight)
    return (b @ a) * adapted.scaling[_ADAPTER]


def _check_targets(model: nn.Module, output_layer: nn.Module | None, options: LoraOptions) -> None:
    modules = list(cast("Iterator[tuple[str, nn.Module]]", model.named_modules()))
    fused = [name for name, parameter in model.named_parameters() if ".experts." in name and parameter.dim() == 3]
    for target in options.targets:
        found = [module for name, module in modules if name.rpartition(".")[2] == target]
        named = f"learner.training.lora.targets names {target!r}"
        if fused and target in _EXPERT_PROJECTIONS:
            raise ConfigError(
                f"{named}, but this model keeps its experts' projections in one fused tensor ({fused[0]}), which LoRA "
                "cannot adapt; choose attention layers: q_proj, k_proj, v_proj, o_proj"
            )
        if not found:
            raise ConfigError(f"{named}, but no layer of this model has that name")
        if any(module is output_layer or not isinstance(module, nn.Linear) for module in found):
            raise ConfigError(f"{named}, which is no linear layer inside the model; choose projections of its layers")


_EXPERT_PROJECTIONS = frozenset({"gate_proj", "up_proj", "down_proj", "gate_up_proj", "experts", "w1", "w2", "w3"})
