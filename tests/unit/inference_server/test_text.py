"""Prompts to token ids and completions to text, with the tokenizer beside a model."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from inference_server.rollout.text import HuggingFaceTokenizer, prompt_token_ids
from leeway.errors import ConfigError

MODEL = Path(__file__).parents[3] / "examples" / "sortmix8" / "model-moe"


def test_a_completion_loses_its_special_tokens_only() -> None:
    tokenizer = HuggingFaceTokenizer(MODEL, chat=False)
    prompt = prompt_token_ids(tokenizer, {"prompt": "hgfedcba>"})
    assert prompt.dtype == np.int32
    end = tokenizer._tokenizer.eos_token_id
    assert tokenizer.decode([*prompt.tolist(), end]) == "hgfedcba>"


def test_a_chat_prompt_needs_a_template_and_uses_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no chat template"):
        HuggingFaceTokenizer(MODEL, chat=True)
    for file in MODEL.iterdir():
        if "tokenizer" in file.name:
            shutil.copy(file, tmp_path)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    tokenizer = HuggingFaceTokenizer(tmp_path, chat=True)
    assert tokenizer.encode("cba") == HuggingFaceTokenizer(MODEL, chat=False).encode("cba>")
