"""Small random models on disk, and snapshots of their weights as a learner would publish them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from leeway.huggingface import published_tensors, save_model, tensor_bytes, tensor_dtype_name
from leeway.types import PolicyVersion, WeightManifest, WeightSnapshot
from leeway.weights.digests import tensor_entry, weights_digest

VOCAB_SIZE = 32
CONTEXT_LENGTH = 48


QWEN_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
MIXTRAL_EXPERTS = {"num_local_experts": 6, "num_experts_per_tok": 2}
DEEPSEEK_EXPERTS = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_group": 3,
    "topk_group": 2,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
}
DEEPSEEK_ATTENTION = {
    "num_key_value_heads": 4,
    "head_dim": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 10,
}
# Each has 2 MoE layers, 6 experts, 2 per token.
MOE_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": QWEN_EXPERTS,
    "mixtral": MIXTRAL_EXPERTS,
    "deepseek_v3": DEEPSEEK_EXPERTS | DEEPSEEK_ATTENTION,
}


def make_model(seed: int, *, moe: bool = True, family: str = "qwen3_moe", **overrides: Any) -> PreTrainedModel:
    """A model whose logits spread widely, so that different weights disagree grossly.

    Args:
        seed: of its weights.
        moe: false for a dense Qwen3.
        family: a key of MOE_FAMILIES.
        overrides: of its configuration.
    """
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
        settings |= MOE_FAMILIES[family]
    settings |= overrides
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family if moe else "qwen3", **settings)).float()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.2)  # zero in a fresh model, which would hide the bias
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
        tensor_entry(name, tensor_dtype_name(tensor), tuple(tensor.shape), buffer)
        for (name, tensor), buffer in zip(tensors, buffers, strict=True)
    ]
    manifest = WeightManifest(tuple(entries))
    return WeightSnapshot(PolicyVersion("run", epoch, step, weights_digest(manifest)), epoch, manifest, buffers)
