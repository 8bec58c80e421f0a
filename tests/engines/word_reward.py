"""The reward of the engines' runs: the share of sampled words that are early in the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def score(task: Mapping[str, Any], completion: str) -> float:
    words = completion.split()
    return sum(int(word.removeprefix("t")) < 64 for word in words) / len(words) if words else 0.0
