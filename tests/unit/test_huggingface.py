from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from leeway.errors import ConfigError, InvalidDataError, PreconditionError
from leeway.huggingface import (
    load_model,
    load_published,
    load_tokenizer,
    model_signature,
    published_tensors,
    save_model,
    tensor_bytes,
    tensor_dtype_name,
    tensor_from_bytes,
)
from leeway.huggingface.moe import find_routers
from tests.harness.tiny_models import CONTEXT_LENGTH, VOCAB_SIZE, make_model, save, save_tokenizer

MODELS: dict[str, dict[str, Any]] = {
    "moe": {"moe": True},
    "moe-with-dense-layer": {"moe": True, "mlp_only_layers": [0]},
    "dense": {"moe": False},
    "tied": {"moe": False, "tie_word_embeddings": True},
    "tied-moe": {"moe": True, "tie_word_embeddings": True},
    "mixtral": {"family": "mixtral"},
    "deepseek-v3": {"family": "deepseek_v3"},
    "deepseek-v3-plain-queries": {"family": "deepseek_v3", "q_lora_rank": None, "first_k_dense_replace": 0},
}


@pytest.fixture(params=MODELS)
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    return MODELS[request.param]


def test_published_names_and_values_are_those_of_the_checkpoint(settings: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(0, **settings)
    model.save_pretrained(tmp_path)
    checkpoint = load_file(tmp_path / "model.safetensors")

    published = published_tensors(model, "float32")

    assert [name for name, _ in published] == sorted(checkpoint, key=str.encode)
    for name, tensor in published:
        assert torch.equal(tensor, checkpoint[name]), name


def test_load_published_makes_the_models_equal_in_place(settings: dict[str, Any]) -> None:
    source, target = make_model(0, **settings), make_model(1, **settings)
    addresses = {name: parameter.data_ptr() for name, parameter in target.named_parameters()}

    load_published(target, dict(published_tensors(source, "float32")))

    assert {name: parameter.data_ptr() for name, parameter in target.named_parameters()} == addresses
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value), name


def test_published_bfloat16_rounds_and_arrives_rounded() -> None:
    source, target = make_model(0), make_model(1)
    load_published(target, dict(published_tensors(source, "bfloat16")))
    name, parameter = next(iter(source.named_parameters()))
    rounded = parameter.detach().to(torch.bfloat16).float()
    assert not torch.equal(rounded, parameter)
    assert torch.equal(target.state_dict()[name], rounded)


def test_what_the_model_keeps_in_float32_is_published_in_float32(tmp_path: Path) -> None:
    """As transformers saves it; a rounded correction bias would choose other experts than the learner's does."""
    model = load_model(save(make_model(0, family="deepseek_v3"), tmp_path / "model"), torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    checkpoint = load_file(tmp_path / "saved" / "model.safetensors")

    for source in (model, make_model(0, family="deepseek_v3")):
        published = dict(published_tensors(source, "bfloat16"))
        assert {name: tensor.dtype for name, tensor in published.items()} == {
            name: tensor.dtype for name, tensor in checkpoint.items()
        }
        assert all(torch.equal(tensor, checkpoint[name]) for name, tensor in published.items())
    kept = {name for name, tensor in checkpoint.items() if tensor.dtype == torch.float32}
    assert kept == {f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (1, 2)}
    assert {tensor_dtype_name(tensor) for tensor in checkpoint.values()} == {"bfloat16", "float32"}


@pytest.mark.parametrize("fault", ["missing", "extra", "misshapen"])
def test_load_published_refuses_what_does_not_fit_and_changes_nothing(fault: str) -> None:
    source, target = make_model(0), make_model(1)
    tensors = dict(published_tensors(source, "float32"))
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    if fault == "missing":
        del tensors[name]
    elif fault == "extra":
        name = "model.layers.9.mlp.gate.weight"
        tensors[name] = torch.zeros(1)
    else:
        tensors[name] = tensors[name].T.contiguous()
    before = {key: value.clone() for key, value in target.state_dict().items()}

    with pytest.raises(PreconditionError, match=f"{fault} {name}"):
        load_published(target, tensors)

    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


@pytest.mark.parametrize("dtype_name", ["float32", "bfloat16", "float16", "int64", "uint8"])
def test_tensor_bytes_round_trip(dtype_name: str) -> None:
    tensor = (torch.arange(24).reshape(2, 3, 4) * 1.5).to(getattr(torch, dtype_name)).transpose(0, 2)
    data = tensor_bytes(tensor)
    back = tensor_from_bytes(dtype_name, (4, 3, 2), memoryview(data))
    assert back.dtype == tensor.dtype
    assert torch.equal(back, tensor)


def test_tensor_bytes_are_little_endian() -> None:
    assert tensor_bytes(torch.tensor([1.0], dtype=torch.bfloat16)) == b"\x80\x3f"


def test_tensor_from_bytes_checks_size_and_type() -> None:
    with pytest.raises(InvalidDataError, match=r"7 bytes are not a float32 tensor of shape \[2\]"):
        tensor_from_bytes("float32", (2,), b"1234567")
    with pytest.raises(InvalidDataError, match="complex64"):
        tensor_from_bytes("complex64", (1,), b"12345678")
    assert tensor_from_bytes("float32", (0, 3), b"").shape == (0, 3)


def test_saved_directory_loads_with_from_pretrained(settings: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(0, **settings)
    tokenizer_directory = tmp_path / "tokenizer"
    save_tokenizer(tokenizer_directory)

    save_model(model, tokenizer_directory, tmp_path / "model", "bfloat16")

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.dtype == torch.bfloat16
    for name, value in model.state_dict().items():
        kept = name.endswith("e_score_correction_bias")
        assert torch.equal(loaded.state_dict()[name], value if kept else value.to(torch.bfloat16)), name
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.convert_tokens_to_ids("t7") == 7


def test_saving_keeps_the_signature(tmp_path: Path) -> None:
    first = save(make_model(0), tmp_path / "first", "bfloat16")
    loaded = load_model(first, torch.float32)
    save_model(loaded, first, tmp_path / "second", "float32")
    assert model_signature(tmp_path / "second") == model_signature(first)


def test_signature_describes_the_model(tmp_path: Path) -> None:
    moe = model_signature(save(make_model(0), tmp_path / "moe"))
    assert (moe.moe_layers, moe.experts, moe.experts_per_token) == (2, 6, 2)
    assert (moe.vocab_size, moe.context_length) == (VOCAB_SIZE, CONTEXT_LENGTH)
    mixed = model_signature(save(make_model(0, mlp_only_layers=[0]), tmp_path / "mixed"))
    assert mixed.moe_layers == 1
    dense = model_signature(save(make_model(0, moe=False), tmp_path / "dense"))
    assert (dense.moe_layers, dense.experts, dense.experts_per_token) == (0, 0, 0)
    assert len({moe.model_digest, mixed.model_digest, dense.model_digest}) == 3
    assert moe.tokenizer_digest == dense.tokenizer_digest


@pytest.mark.parametrize(
    ("family", "overrides", "layers"),
    [
        ("qwen3_moe", {"num_hidden_layers": 5, "mlp_only_layers": [1]}, 4),
        ("qwen3_moe", {"num_hidden_layers": 5, "decoder_sparse_step": 2}, 2),
        ("qwen3_moe", {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3, 4]}, 2),
        ("mixtral", {"num_hidden_layers": 3}, 3),
        ("deepseek_v3", {"num_hidden_layers": 5, "first_k_dense_replace": 2}, 3),
        ("deepseek_v3", {"num_hidden_layers": 2, "first_k_dense_replace": 0}, 2),
        ("deepseek_v3", {"num_hidden_layers": 2, "first_k_dense_replace": 3}, 0),
    ],
)
def test_signature_counts_the_layers_that_have_a_router(
    family: str, overrides: dict[str, Any], layers: int, tmp_path: Path
) -> None:
    model = make_model(0, family=family, **overrides)
    signature = model_signature(save(model, tmp_path))
    assert len(find_routers(model.named_modules())) == layers
    expected = (layers, 6, 2) if layers else (0, 0, 0)
    assert (signature.moe_layers, signature.experts, signature.experts_per_token) == expected


def test_signature_sees_the_function_and_nothing_else(tmp_path: Path) -> None:
    path = save(make_model(0), tmp_path / "model")
    original = model_signature(path)
    file = path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"transformers_version": "4.0", "use_cache": False, "dtype": "float16"}))
    assert model_signature(path) == original
    file.write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert model_signature(path).model_digest != original.model_digest
    (path / "chat_template.jinja").write_text("{{ messages }}")
    assert model_signature(path).tokenizer_digest != original.tokenizer_digest


def test_load_model_gives_the_type_asked_for(tmp_path: Path) -> None:
    model = load_model(save(make_model(0), tmp_path / "model", "bfloat16"), torch.float32)
    assert model.dtype == torch.float32
    assert not model.training


def test_experts_whose_checkpoint_names_are_unknown_are_refused() -> None:
    model = make_model(0)
    model.config.model_type = "another_moe"  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ConfigError, match=r"another_moe's fused model\.layers\.0\.mlp\.experts\.gate_up_proj"):
        published_tensors(model, "float32")


def _remove(name: str) -> Any:
    return lambda path: (path / name).unlink()


def _truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:200])


def _lose_a_tensor(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.0.mlp.gate.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "does not exist"),
        (_remove("config.json"), "has no config.json"),
        (_remove("model.safetensors"), "has no .*safetensors"),
        (_truncate, "cannot be loaded"),
        (_lose_a_tensor, "lack or misshape model.layers.0.mlp.gate.weight"),
    ],
)
def test_load_model_says_what_is_wrong_with_a_directory(damage: Any, message: str, tmp_path: Path) -> None:
    path = save(make_model(0), tmp_path / "model")
    damage(path)
    with pytest.raises(ConfigError, match=message) as caught:
        load_model(path, torch.float32)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_signature_and_tokenizer_say_what_is_wrong(tmp_path: Path) -> None:
    path = save(make_model(0), tmp_path / "model")
    (path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is not JSON"):
        model_signature(path)
    (path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(ConfigError, match=r"config\.json cannot be used"):
        model_signature(path)
    with pytest.raises(ConfigError, match="does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="has no tokenizer"):
        load_tokenizer(tmp_path / "empty")


def test_saved_weights_are_safetensors_of_the_published_type(tmp_path: Path) -> None:
    path = save(make_model(0), tmp_path / "model", "bfloat16")
    with safe_open(path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("model.layers.0.mlp.experts.3.down_proj.weight").dtype == torch.bfloat16
    assert not list(path.glob("*.bin"))
