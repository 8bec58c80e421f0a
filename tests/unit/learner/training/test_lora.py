"""LoRA: only adapters are trained and saved; merged weights are published, and the base is never touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from learner.training.torch_trainer import TorchTrainer
from leeway.config import TrainingOptions
from leeway.errors import ConfigError
from leeway.huggingface import load_published, tensor_from_bytes
from leeway.types import TrajectoryGroup
from tests.harness import tiny_models
from tests.harness.learner_builders import assert_resumes, dense_model, groups, moe_model, trainer, weights


def options(**changes: Any) -> TrainingOptions:
    lora = {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "o_proj", "down_proj"], **changes.pop("lora", {})}
    return TrainingOptions.model_validate({"learning_rate": 1e-2, "publish_dtype": "float32", "lora": lora, **changes})


def published(model: PreTrainedModel, taught: Any) -> PreTrainedModel:
    """A plain model with what was published."""
    manifest, buffers = taught.published()
    tensors = {
        entry.name: tensor_from_bytes(entry.dtype, entry.shape, data)
        for entry, data in zip(manifest.tensors, buffers, strict=True)
    }
    load_published(model, tensors)
    return model


def statistics(taught: Any, step: list[TrajectoryGroup]) -> dict[str, float]:
    return dict(taught.train_step(1, step).statistics)


@pytest.mark.parametrize("moe", [False, True])
def test_before_the_first_step_the_published_model_is_the_base(moe: bool) -> None:
    make = moe_model if moe else dense_model
    taught = trainer(make(), options(lora={"targets": ["q_proj", "v_proj"]}))
    plain = trainer(make(), TrainingOptions(publish_dtype="float32"))
    assert taught.published() == plain.published()


@pytest.mark.parametrize("moe", [False, True])
def test_the_published_model_computes_what_the_adapted_one_does(moe: bool) -> None:
    make = moe_model if moe else dense_model
    step = groups(routing=moe)
    targets = ["q_proj", "v_proj"] if moe else ["q_proj", "o_proj", "down_proj"]
    adapted = make()
    base = weights(adapted)
    taught = trainer(adapted, options(lora={"targets": targets}, routing_replay=moe))
    for number in (1, 2, 3):
        taught.train_step(number, step)
    merged = published(make(), taught)
    moved = [name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, base[name])]
    assert moved
    assert all(name.rpartition(".")[0].rpartition(".")[2] in targets for name in moved)
    plain = trainer(merged, TrainingOptions(publish_dtype="float32", routing_replay=moe))
    seen, expected = statistics(plain, step), statistics(taught, step)
    for name in ("loss", "entropy", "ratio_mean", "k3"):
        assert seen[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6)
    # Merging has left the base alone.
    for name, tensor in adapted.state_dict().items():
        if ".lora_" not in name:
            assert torch.equal(tensor, base[name.replace(".base_layer", "")]), name


def test_a_checkpoint_holds_adapters_alone_and_continues_to_the_bit(tmp_path: Path) -> None:
    assert_resumes(dense_model, options(), [groups()] * 4, tmp_path)
    names = [name for file in (tmp_path / "weights").glob("*.safetensors") for name in load_file(file)]
    assert len(names) == 12  # two layers, three targets, A and B
    assert all(".lora_" in name for name in names)


def test_the_first_adapters_are_the_same_in_every_process_and_differ_by_seed() -> None:
    step = groups()

    def after_a_step(seed: int) -> Any:
        torch.rand(7)  # whatever else used the generator
        taught = trainer(dense_model(), options(lora={"seed": seed}))
        taught.train_step(1, step)
        return taught.published()[0]

    assert after_a_step(0) == after_a_step(0)
    assert after_a_step(0) != after_a_step(1)


def test_an_export_is_a_plain_model(tmp_path: Path) -> None:
    source = tiny_models.save(tiny_models.make_model(0, moe=False), tmp_path / "source")
    taught = TorchTrainer.from_directory(source, options())
    taught.train_step(1, groups())
    taught.export(source, tmp_path / "export")
    plain = TorchTrainer.from_directory(tmp_path / "export", TrainingOptions(publish_dtype="float32"))
    assert plain.published() == taught.published()


@pytest.mark.parametrize(
    ("moe", "target", "message"),
    [
        (True, "gate_proj", "fused tensor"),
        (True, "experts", "fused tensor"),
        (True, "gate", "no linear layer"),
        (False, "lm_head", "no linear layer inside"),
        (False, "embed_tokens", "no linear layer"),
        (False, "query", "no layer of this model"),
    ],
)
def test_targets_that_cannot_be_adapted_are_refused(moe: bool, target: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer(moe_model() if moe else dense_model(), options(lora={"targets": ["q_proj", target]}))
