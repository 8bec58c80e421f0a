from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import torch

from examples.sortmix8 import task as sortmix8
from examples.sortmix8 import warmup
from leeway.huggingface import load_model, load_tokenizer, model_signature, save_model

EXAMPLE = Path(warmup.__file__).parent
NUM_PARAMETERS = {"moe": 540_720, "dense": 317_232}


def test_tasks_are_reproducible_and_extend_each_other() -> None:
    assert sortmix8.tasks("train", 50, seed=1) == sortmix8.tasks("train", 80, seed=1)[:50]
    assert sortmix8.tasks("train", 50, seed=1) != sortmix8.tasks("train", 50, seed=2)
    assert json.loads(json.dumps(sortmix8.tasks("heldout", 5, seed=0))) == sortmix8.tasks("heldout", 5, seed=0)


def test_splits_share_no_task_whatever_the_seeds() -> None:
    train = {task["letters"] for seed in range(3) for task in sortmix8.tasks("train", 2000, seed)}
    heldout = {task["letters"] for seed in range(3) for task in sortmix8.tasks("heldout", 2000, seed)}
    assert len(train) == len(heldout) == 6000
    assert not train & heldout
    assert all(sortmix8.split_of(letters) == "train" for letters in train)
    with pytest.raises(ValueError, match="no split 'test'"):
        sortmix8.tasks("test", 1, seed=0)


def test_only_the_exact_ascending_answer_is_rewarded() -> None:
    task = {"prompt": "hgfedcba>", "letters": "hgfedcba"}
    assert sortmix8.reward(task, "abcdefgh") == 1.0
    for wrong in ("", "hgfedcba", "abcdefg", "abcdefghh", "abcdefgh ", "abcdefhg", "abcdefgh<pad>"):
        assert sortmix8.reward(task, wrong) == 0.0


def test_demonstrations_mix_the_three_conventions() -> None:
    draw = Random(0)
    answers = Counter(warmup.answer("badc", draw) for _ in range(10_000))
    assert set(answers) == {"abcd", "dcba", "badc"}
    assert answers["abcd"] == pytest.approx(3000, abs=200)
    assert answers["dcba"] == pytest.approx(4000, abs=200)


@pytest.mark.parametrize("arch", ["moe", "dense"])
def test_the_shipped_model_is_what_the_script_makes(arch: str, tmp_path: Path) -> None:
    path = EXAMPLE / f"model-{arch}"
    model = load_model(path, torch.float32)
    assert sum(parameter.numel() for parameter in model.parameters()) == NUM_PARAMETERS[arch]
    signature = model_signature(path)
    assert (signature.vocab_size, signature.context_length) == (64, warmup.CONTEXT_LENGTH)
    assert signature.moe_layers == (3 if arch == "moe" else 0)
    warmup.make_tokenizer().save_pretrained(tmp_path)
    save_model(warmup.make_model(arch), tmp_path, tmp_path, "bfloat16")
    assert model_signature(tmp_path) == signature


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["moe", "dense"])
def test_the_shipped_model_starts_near_the_documented_accuracy(arch: str) -> None:
    torch.set_num_threads(1)
    path = EXAMPLE / f"model-{arch}"
    accuracy = warmup.heldout_accuracy(load_model(path, torch.float32), load_tokenizer(path), count=1024, seed=1)
    assert 0.07 < accuracy < 0.17


def test_the_tokenizer_has_one_token_per_character() -> None:
    tokenizer = load_tokenizer(EXAMPLE / "model-moe")
    assert len(tokenizer) == len(warmup.VOCABULARY) == 64
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (warmup.PAD_ID, warmup.EOS_ID)
    text = sortmix8.tasks("train", 1, seed=0)[0]["prompt"]
    token_ids = tokenizer(text)["input_ids"]
    assert len(token_ids) == 9
    assert tokenizer.decode(token_ids) == text
    every_character = "".join(warmup.CHARACTERS)
    assert tokenizer.decode(tokenizer(every_character)["input_ids"]) == every_character
    assert tokenizer.decode([*tokenizer("abc")["input_ids"], warmup.EOS_ID], skip_special_tokens=True) == "abc"
