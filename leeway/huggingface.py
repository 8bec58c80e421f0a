"""Hugging Face models as Leeway uses them: load, describe, publish, take published weights, save.

The only shared module that imports transformers and torch. Everything is local: no hub, no code from a model
directory, safetensors only.

A published tensor has the name it has in a Hugging Face checkpoint. transformers keeps the experts of a layer fused
in two parameters; here they are views, one per expert and projection (E experts, I intermediate size, H hidden size):

    experts.gate_up_proj [E, 2I, H]  ->  experts.{e}.gate_proj.weight [I, H],  experts.{e}.up_proj.weight [I, H]
    experts.down_proj    [E, H, I]   ->  experts.{e}.down_proj.weight [H, I]

Mixtral's are block_sparse_moe.experts.{e}.w1, .w3 and .w2. What a model keeps in float32 whatever it computes in, such
as the correction bias of DeepSeek-V3's routers, is published in float32.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from leeway.dtypes import element_size_bytes
from leeway.errors import ConfigError, InvalidDataError, PreconditionError
from leeway.moe import FAMILIES, checkpoint_name, moe_shape
from leeway.types import ModelSignature

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

# What a config.json may say without changing the function from tokens to logits.
_NON_FUNCTIONAL_CONFIG_KEYS: Final = frozenset(
    {
        "_name_or_path",
        "attention_dropout",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "initializer_range",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "return_dict",
        "router_aux_loss_coef",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
_NON_FUNCTIONAL_TOKENIZER_KEYS: Final = frozenset(
    {"is_local", "local_files_only", "model_max_length", "name_or_path", "processor_class", "transformers_version"}
)
_TOKENIZER_FILES: Final = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def torch_dtype(dtype_name: str) -> torch.dtype:
    """The torch element type of a name in leeway.dtypes.

    Raises:
        InvalidDataError: for a name that has no wire form.
    """
    element_size_bytes(dtype_name)
    return _TORCH_DTYPE[dtype_name]


def load_model(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load a causal language model from a local directory, in evaluation mode.

    Args:
        path: directory with config.json and safetensors.
        dtype: element type to compute in.

    Raises:
        ConfigError: the directory is not a whole model; names what is missing.
    """
    _require_model_files(path)
    disable_progress_bar()
    try:
        loaded = cast("Any", AutoModelForCausalLM).from_pretrained(
            path,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"the model in {path} cannot be loaded: {_one_line(error)}") from error
    model, loading = cast("tuple[PreTrainedModel, Mapping[str, Iterable[Any]]]", loaded)
    absent = sorted(str(name) for kind in ("missing_keys", "mismatched_keys") for name in loading.get(kind, ()))
    if absent:
        raise ConfigError(f"the weights in {path} lack or misshape {_listing(absent)}; give a whole checkpoint")
    return model.eval()


def model_outline(path: Path) -> PreTrainedModel:
    """The model in a directory without its weights: for `check_published`, where another program holds the weights.

    Raises:
        ConfigError: the directory has no config.json, or one that cannot be used.
    """
    _require_config(path)
    try:
        config = cast("Any", AutoConfig).from_pretrained(path, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            return cast("PreTrainedModel", cast("Any", AutoModelForCausalLM).from_config(config))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path / 'config.json'} cannot be used: {_one_line(error)}") from error


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer beside a model.

    Raises:
        ConfigError: the directory has no usable tokenizer.
    """
    if not path.is_dir():
        raise ConfigError(f"the model directory {path} does not exist")
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        raise ConfigError(f"{path} has no tokenizer; put tokenizer.json and tokenizer_config.json there")
    try:
        tokenizer = cast("Any", AutoTokenizer).from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"the tokenizer in {path} cannot be loaded: {_one_line(error)}") from error
    return cast("PreTrainedTokenizerBase", tokenizer)


def model_signature(path: Path) -> ModelSignature:
    """Describe the model in a directory from its files, without loading weights.

    The model digest is the SHA-256 of config.json as canonical JSON without what does not change the function; the
    tokenizer digest is the SHA-256 over the tokenizer's files and chat template.

    Raises:
        ConfigError: the directory has no config.json, or one that cannot be read.
    """
    _require_config(path)
    raw = _read_json(path / "config.json")
    try:
        config = cast("Any", AutoConfig).from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path / 'config.json'} cannot be used: {_one_line(error)}") from error
    moe = moe_shape(config)
    return ModelSignature(
        model_digest=hashlib.sha256(_canonical(raw, _NON_FUNCTIONAL_CONFIG_KEYS)).digest(),
        tokenizer_digest=_tokenizer_digest(path),
        vocab_size=int(config.vocab_size),
        moe_layers=moe.layers,
        experts=moe.experts,
        experts_per_token=moe.experts_per_token,
        context_length=int(config.max_position_embeddings),
    )


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
    """What is published of one tensor of `model.state_dict()`, tied names left out: as in `published_tensors`.

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
        f"{kind} {_listing(names)}"
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


def tensor_dtype_name(tensor: torch.Tensor) -> str:
    """The name in leeway.dtypes of a tensor's element type."""
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


def save_model(
    model: PreTrainedModel,
    tokenizer_directory: Path,
    directory: Path,
    dtype_name: str,
    state: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write a directory that `from_pretrained` loads: config, weights as published, the tokenizer's files unchanged.

    Args:
        model: the weights.
        tokenizer_directory: where the tokenizer's files are copied from.
        directory: where to write; created when missing.
        dtype_name: element type of the saved weights.
        state: the weights to save, as `model.state_dict()` names them, tied ones left out; unset: the model's own.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = cast("Any", copy.deepcopy(model.config))
    config.dtype = dtype_name
    config.architectures = [type(model).__name__]
    config.save_pretrained(directory)
    cast("Any", model).generation_config.save_pretrained(directory)
    # Cloned, because experts that are still views of one parameter cannot be saved under their own names.
    published = (
        published_tensors(model, dtype_name)
        if state is None
        else [part for name, tensor in state.items() for part in published_parts(model, name, tensor, dtype_name)]
    )
    tensors = {name: tensor.clone() for name, tensor in published}
    save_torch_state_dict(tensors, directory, metadata={"format": "pt"})
    for name in _TOKENIZER_FILES:
        source = tokenizer_directory / name
        if source.is_file() and source.resolve() != (directory / name).resolve():
            shutil.copyfile(source, directory / name)


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


def _tokenizer_digest(path: Path) -> bytes:
    digest = hashlib.sha256()
    for name in _TOKENIZER_FILES:
        file = path / name
        if not file.is_file():
            continue
        content = file.read_bytes()
        if name == "tokenizer_config.json":
            content = _canonical(_read_json(file), _NON_FUNCTIONAL_TOKENIZER_KEYS)
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.digest()


def _require_config(path: Path) -> None:
    if not path.is_dir():
        raise ConfigError(f"the model directory {path} does not exist")
    if not (path / "config.json").is_file():
        raise ConfigError(f"{path} is not a model directory: it has no config.json")


def _require_model_files(path: Path) -> None:
    _require_config(path)
    if not any(path.glob("*.safetensors")):
        raise ConfigError(f"{path} has no *.safetensors weights; other formats are not loaded")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} is not a JSON object")
    return cast("dict[str, Any]", content)


def _canonical(content: Mapping[str, Any], without: frozenset[str]) -> bytes:
    kept = {key: value for key, value in content.items() if key not in without}
    return json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _listing(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
