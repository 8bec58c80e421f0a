"""A task for rehearsals: nothing in it can be learned, everything in it is scored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_FIRST = {"train": 0, "heldout": 1_000_000}


def tasks(split: str, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` numbered prompts of one split; no prompt is in both."""
    return [{"prompt": f"task {seed} {_FIRST[split] + index}"} for index in range(count)]


def reward(task: Mapping[str, Any], completion: str) -> float:
    """The share of digits in the completion."""
    del task  # every prompt is as good as another
    return sum(character.isdigit() for character in completion) / max(len(completion), 1)
