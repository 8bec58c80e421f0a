"""Model directories: load, describe, save.

Everything is local: no hub, no code from a model directory, safetensors only.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, cast

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from leeway.errors import ConfigError
from leeway.huggingface.moe import moe_shape
from leeway.huggingface.published import listing, published_parts, published_tensors
from leeway.types import ModelSignature

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
        raise ConfigError(f"the weights in {path} lack or misshape {listing(absent)}; give a whole checkpoint")
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
