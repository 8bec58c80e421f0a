"""A model's weights as they are published: under the names of a Hugging Face checkpoint.

transformers keeps the experts of a layer fused in two parameters; here they are views, one per expert and projection
(E experts, I intermediate size, H hidden size):

    experts.gate_up_proj [E, 2I, H]  ->  experts.{e}.gate_proj.weight [I, H],  experts.{e}.up_proj.weight [I, H]
    experts.down_proj    [E, H, I]   ->  experts.{e}.down_proj.weight [H, I]

Mixtral's are block_sparse_moe.experts.{e}.w1, .w3 and .w2. What a model keeps in float32 whatever it computes in, such
as the correction bias of DeepSeek-V3's routers, is published in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, cast

import torch
from transformers import PreTrainedModel

from leeway.codec.dtypes import element_size_bytes
from leeway.errors import ConfigError, InvalidDataError, PreconditionError
from leeway.huggingface.moe import FAMILIES, checkpoint_name

_TORCH_DTYPE: Final = {
    "uint8": torch.uint8,
    "uint16": torch.uint16,
    "int32": torch.int32,
    "int64": torch.int64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


def published_tensors(model: PreTrainedModel, dtype_name: str) -> list[tuple[str, torch.Tensor]]:
    """The weights as they are published: contiguous CPU copies or views of type `dtype_name`, in byte order of name.

    Names are those of a Hugging Face checkpoint, one tensor per expert, tied weights once. What the model keeps in
    float32 at a smaller type stays in float32.

    Raises:
        ConfigError: the architecture fuses experts in a way that is not known here.
    """
    dtype = torch_dtype(dtype_name)
    views = _published_views(model)
    return [
        (name, views[name].detach().to(device="cpu", dtype=_published_dtype(model, name, dtype)).contiguous())
        for name in sorted(views, key=lambda name: name.encode())
    ]


def published_parts(
    model: PreTrainedModel, name: str, tensor: torch.Tensor, dtype_name: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """The published parts of one tensor of `model.state_dict()`, tied names left out: as in `published_tensors`.

    `tensor` is the whole tensor, which need not be the model's own: so a sharded model is published piece by piece.

    Raises:
        ConfigError: the architecture fuses experts in a way that is not known here.
    """
    dtype = torch_dtype(dtype_name)
    for published_name, view in _unfused(model, name, tensor):
        wanted = _published_dtype(model, published_name, dtype)
        yield published_name, view.detach().to(device="cpu", dtype=wanted).contiguous()


def check_published(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that published names and shapes are exactly the model's.

    Raises:
        PreconditionError: naming what is missing, extra or misshapen.
    """
    views = _published_views(model)
    missing = sorted(views.keys() - shapes.keys())
    extra = sorted(shapes.keys() - views.keys())
    misshapen = sorted(name for name in views.keys() & shapes.keys() if tuple(views[name].shape) != tuple(shapes[name]))
    faults = [
        f"{kind} {listing(names)}"
        for kind, names in (("missing", missing), ("extra", extra), ("misshapen", misshapen))
        if names
    ]
    if faults:
        raise PreconditionError(
            f"published weights do not fit the {model.config.model_type} model: {'; '.join(faults)}; "
            "learner and servers must load the same architecture"
        )


@torch.no_grad()
def load_published(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy published weights into the model in place: all of them, or none when they do not fit.

    Raises:
        PreconditionError: naming what is missing, extra or misshapen; the model is unchanged.
    """
    check_published(model, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    for name, view in _published_views(model).items():
        view.copy_(tensors[name])


def _published_views(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Every published name with a view into the model's own memory."""
    tied = _tied_names(model)
    views: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name not in tied:
            views.update(_unfused(model, name, tensor))
    return views


def _unfused(model: PreTrainedModel, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The published views of one parameter: itself, or one per expert and projection."""
    model_type = model.config.model_type
    prefix, _, last = name.rpartition(".")
    if not prefix.endswith(".experts") or tensor.dim() != 3:
        yield checkpoint_name(model_type, name), tensor
        return
    family = FAMILIES.get(model_type)
    if family is None or last not in ("gate_up_proj", "down_proj"):
        raise ConfigError(
            f"the checkpoint names of {model_type}'s fused {name} are not known; "
            f"models with fused experts that can be published: {', '.join(FAMILIES)}"
        )
    prefix = checkpoint_name(model_type, prefix)
    gate_proj, up_proj, down_proj = family.projections
    for expert in range(tensor.shape[0]):
        if last == "down_proj":
            yield f"{prefix}.{expert}.{down_proj}.weight", tensor[expert]
        else:
            gate, up = tensor[expert].chunk(2, dim=0)
            yield f"{prefix}.{expert}.{gate_proj}.weight", gate
            yield f"{prefix}.{expert}.{up_proj}.weight", up


def _published_dtype(model: PreTrainedModel, name: str, dtype: torch.dtype) -> torch.dtype:
    kept = cast("Iterable[str]", getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    return torch.float32 if dtype.itemsize < 4 and not set(kept).isdisjoint(name.split(".")) else dtype


def _tied_names(model: PreTrainedModel) -> set[str]:
    """Names that share another name's weights and are not published."""
    return set(cast("Any", model).all_tied_weights_keys or ())


def listing(names: Sequence[str]) -> str:
    """The first of many names, for a message."""
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


# Tensors and their bytes


def torch_dtype(dtype_name: str) -> torch.dtype:
    """The torch element type of a name in leeway.codec.dtypes.

    Raises:
        InvalidDataError: for a name that has no wire form.
    """
    element_size_bytes(dtype_name)
    return _TORCH_DTYPE[dtype_name]


def tensor_dtype_name(tensor: torch.Tensor) -> str:
    """The name in leeway.codec.dtypes of a tensor's element type."""
    return str(tensor.dtype).removeprefix("torch.")


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """A tensor's elements as little-endian bytes in row-major order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def tensor_from_bytes(dtype_name: str, shape: tuple[int, ...], buffer: bytes | memoryview) -> torch.Tensor:
    """A tensor that owns a copy of little-endian bytes.

    Raises:
        InvalidDataError: the size of the buffer is not what dtype and shape say.
    """
    dtype = torch_dtype(dtype_name)
    if len(buffer) != math.prod(shape) * dtype.itemsize:
        raise InvalidDataError(f"{len(buffer)} bytes are not a {dtype_name} tensor of shape {list(shape)}")
    if not buffer:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(buffer), dtype=dtype).reshape(shape)
