"""Small random models on disk, and snapshots of their weights as a learner would publish them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from leeway.huggingface import published_tensors, save_model, tensor_bytes
from leeway.types import PolicyVersion, WeightManifest, WeightSnapshot
from leeway.weights import tensor_entry, weights_digest

VOCAB_SIZE = 32
CONTEXT_LENGTH = 48


def make_model(seed: int, *, moe: bool = True, **overrides: Any) -> PreTrainedModel:
    """A model whose logits spread widely, so that different weights disagree grossly."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": CONTEXT_LENGTH,
        "tie_word_embeddings": False,
        "initializer_range": 0.4,
    }
    if moe:
        settings |= {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
    settings |= overrides
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings)) if moe else Qwen3ForCausalLM(Qwen3Config(**settings))
    return model.eval()


def save_tokenizer(directory: Path) -> None:
    vocabulary = {f"t{index}": index for index in range(VOCAB_SIZE)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="t0", eos_token="t1").save_pretrained(directory)


def save(model: PreTrainedModel, directory: Path, dtype_name: str = "float32") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_tokenizer(directory)
    save_model(model, directory, directory, dtype_name)
    return directory


def snapshot(model: PreTrainedModel, step: int = 0, *, epoch: int = 1, dtype_name: str = "float32") -> WeightSnapshot:
    tensors = published_tensors(model, dtype_name)
    buffers = [tensor_bytes(tensor) for _, tensor in tensors]
    entries = [
        tensor_entry(name, dtype_name, tuple(tensor.shape), buffer)
        for (name, tensor), buffer in zip(tensors, buffers, strict=True)
    ]
    manifest = WeightManifest(tuple(entries))
    return WeightSnapshot(PolicyVersion("run", epoch, step, weights_digest(manifest)), epoch, manifest, buffers)
