"""Tiny random models and made-up trajectories for the learner's tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from learner.policy.model import PolicyModel
from learner.trainer import UnusableGroupError
from learner.training.torch_trainer import TorchTrainer
from leeway.config import TrainingOptions
from leeway.errors import LeewayError
from leeway.huggingface import torch_dtype
from leeway.types import (
    Array,
    FinishReason,
    ModelSignature,
    SamplingParams,
    Segment,
    SegmentKind,
    Trajectory,
    TrajectoryGroup,
)

VOCABULARY = 32
CONTEXT = 64
EXPERTS = 6
SLOTS = 2
# Of every family. Where a family can have dense layers, an MoE layer's place differs from its layer's number.
MOE = ModelSignature(b"moe", b"tokenizer", VOCABULARY, 2, EXPERTS, SLOTS, CONTEXT)
DENSE = ModelSignature(b"dense", b"tokenizer", VOCABULARY, 0, 0, 0, CONTEXT)
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def dense_model(seed: int = 0, *, tied: bool = True) -> PreTrainedModel:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=12,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=tied,
            initializer_range=0.2,
        )
    ).float()


MOE_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "num_experts": EXPERTS,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],
        "decoder_sparse_step": 1,
        "num_key_value_heads": 1,
        "head_dim": 12,
    },
    "mixtral": {"num_local_experts": EXPERTS, "num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 12},
    "deepseek_v3": {
        "n_routed_experts": EXPERTS,
        "n_group": 3,
        "topk_group": 2,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 2,
        "q_lora_rank": 12,
        "kv_lora_rank": 10,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 6,
        "v_head_dim": 8,
    },
}


def moe_model(seed: int = 0, *, family: str = "qwen3_moe", renormalise: bool = True) -> PreTrainedModel:
    """A model that MOE describes; `renormalise` says nothing to Mixtral, which always does."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=48,
        num_attention_heads=2,
        num_experts_per_tok=SLOTS,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.2,
        **({} if family == "mixtral" else {"norm_topk_prob": renormalise}),
        **MOE_FAMILIES[family],
    )
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.2)  # zero in a fresh model
    return model


def trajectory(
    name: str,
    length: int,
    *,
    prompt: int = 3,
    reward: float = 0.0,
    seed: int = 0,
    temperature: float = 1.0,
    routing: bool = False,
) -> Trajectory:
    """A trajectory of random tokens with plausible behavior log-probs."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(length, dtype=np.bool_)
    mask[prompt:] = True
    return Trajectory(
        trajectory_id=name,
        member=0,
        attempt=1,
        server_id="server",
        token_ids=rng.integers(0, VOCABULARY, length).astype(np.int32),
        behavior_logprobs=np.where(mask, -rng.uniform(0.5, 6.0, length), 0.0).astype(np.float32),
        loss_mask=mask,
        version_spans=(),
        segments=(
            Segment(SegmentKind.PROMPT, 0, prompt),
            Segment(SegmentKind.MODEL, prompt, length, True, SamplingParams(temperature=temperature)),
        ),
        reward=reward,
        finish_reason=FinishReason.STOP,
        generation_started_at=NOW,
        generation_finished_at=NOW,
        routing=random_routing(length - 1, seed) if routing else None,
    )


def random_routing(rows: int, seed: int) -> Array:
    """[rows, L, k] distinct experts per row, in random order."""
    scores = np.random.default_rng(seed).random((rows, MOE.moe_layers, EXPERTS))
    return np.argsort(scores, axis=-1)[..., :SLOTS].astype(np.uint8)


def groups(*, routing: bool = False, seed: int = 0, count: int = 3, members: int = 4) -> list[TrajectoryGroup]:
    """Groups of uneven lengths; the last one has equal rewards."""
    rng = np.random.default_rng(seed)
    made: list[TrajectoryGroup] = []
    for g in range(count):
        rewards = [1.0] * members if g == count - 1 else [float(m % 2) for m in range(members)]
        made.append(
            TrajectoryGroup(
                f"group-{g}",
                g,
                tuple(
                    replace(
                        trajectory(
                            f"group-{g}-{m}",
                            int(rng.integers(5, 16)),
                            reward=rewards[m],
                            seed=int(rng.integers(1 << 30)),
                            routing=routing,
                        ),
                        member=m,
                    )
                    for m in range(members)
                ),
            )
        )
    return made


def trainer(model: PreTrainedModel, options: TrainingOptions) -> TorchTrainer:
    signature = MOE if model.config.model_type in MOE_FAMILIES else DENSE
    policy = PolicyModel(
        model,
        routing_replay=options.routing_replay and signature is MOE,
        gradient_checkpointing=options.gradient_checkpointing,
        head=options.head,
        compute_dtype=torch_dtype(options.compute_dtype),
        lora=options.lora,
        load_balancing=options.load_balancing > 0,
    )
    return TorchTrainer(policy, signature, options)


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A copy of the model's weights."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A copy of the model's gradients."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_weights(model: PreTrainedModel, expected: Mapping[str, torch.Tensor]) -> None:
    """The model's weights are these, bit for bit."""
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def assert_refused(
    make: Callable[[], PreTrainedModel],
    options: TrainingOptions,
    bad: Sequence[TrajectoryGroup],
    good: Sequence[TrajectoryGroup],
    message: str,
) -> None:
    """A step that member 2 of group 1 spoils is refused by name and leaves no trace in what follows."""
    model, fresh = make(), make()
    taught, before = trainer(model, options), weights(model)
    with pytest.raises(UnusableGroupError, match=message) as refusal:
        taught.train_step(1, bad)
    assert isinstance(refusal.value, LeewayError)
    assert refusal.value.group_id == "group-1"
    assert "trajectory group-1-2" in refusal.value.message
    assert "\n" not in refusal.value.message
    assert_weights(model, before)
    assert taught.train_step(1, good).statistics == trainer(fresh, options).train_step(1, good).statistics
    assert_weights(model, fresh.state_dict())


def assert_resumes(
    make: Callable[[], PreTrainedModel],
    options: TrainingOptions,
    steps: Sequence[Sequence[TrajectoryGroup]],
    directory: Path,
) -> None:
    """A checkpoint in the middle, loaded over other weights, continues to the bits of training straight through."""
    model, half = make(), len(steps) // 2
    straight, first = trainer(model, options), trainer(make(), options)
    expected = [straight.train_step(number, step).statistics for number, step in enumerate(steps, 1)]
    for number, step in enumerate(steps[:half], 1):
        first.train_step(number, step)
    first.save(directory)
    other = make()
    resumed = trainer(other, options)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:  # a checkpoint with adapters does not hold their base
                parameter.add_(1.0)
    resumed.load(directory)
    found = [resumed.train_step(number, step).statistics for number, step in enumerate(steps[half:], half + 1)]
    assert found == expected[half:]
    assert_weights(other, model.state_dict())
    assert resumed.published() == straight.published()
