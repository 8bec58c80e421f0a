"""From prompts to token ids and from token ids to completions. Sampled tokens are never encoded again."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from leeway.errors import ConfigError
from leeway.tasks import Task
from leeway.types import Int32Array


class Tokenizer(Protocol):
    """The tokenizer interface that the rollout worker needs."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt."""
        ...

    def decode(self, token_ids: Iterable[int]) -> str:
        """Text of a completion, without special tokens."""
        ...


class HuggingFaceTokenizer:
    """The tokenizer in a model directory; it renders prompts as a user's message if `chat` is set.

    Raises:
        ConfigError: the directory has no tokenizer, or no chat template where one is needed.
    """

    def __init__(self, path: Path, *, chat: bool) -> None:
        from leeway.huggingface import load_tokenizer  # torch and transformers come with it

        self._tokenizer: Any = load_tokenizer(path)
        self._chat = chat
        if chat and not self._tokenizer.chat_template:
            raise ConfigError(f"task.chat is set, but the tokenizer in {path} has no chat template")

    def encode(self, text: str) -> list[int]:
        if not self._chat:
            return list(self._tokenizer.encode(text))
        messages = [{"role": "user", "content": text}]
        return list(
            self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        )

    def decode(self, token_ids: Iterable[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))


def prompt_token_ids(tokenizer: Tokenizer, task: Task) -> Int32Array:
    """The prompt of a task: int32 [n]."""
    return np.array(tokenizer.encode(task["prompt"]), dtype=np.int32)
