"""The sortmix8 task: given eight letters and `>`, write them in ascending order.

The warm-up demonstrations mix ascending, descending and copied answers, and the verifier wants the ascending one:
part of what reinforcement learning finds is which convention counts.
"""

from __future__ import annotations

import hashlib
import random
import string
from collections.abc import Mapping
from typing import Any

NUM_LETTERS = 8
END_OF_PROMPT = ">"
SPLITS = ("train", "heldout")


def split_of(letters: str) -> str:
    """The split that owns a string of letters: one in eight is held out, decided by its digest alone."""
    return "heldout" if hashlib.sha256(letters.encode()).digest()[0] % 8 == 0 else "train"


def tasks(split: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Draw `count` different tasks of one split.

    Equal arguments give equal tasks, and a longer list extends a shorter one.

    Args:
        split: "train" or "heldout"; no string of letters is ever in both, whatever the seeds.
        count: number of tasks.
        seed: of the drawing.

    Returns:
        Tasks with `prompt` (text for the model) and `letters` (what the verifier needs).

    Raises:
        ValueError: for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"sortmix8 has no split {split!r}; use one of {', '.join(SPLITS)}")
    draw = random.Random(f"sortmix8/{split}/{seed}")
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        letters = "".join(draw.choices(string.ascii_lowercase, k=NUM_LETTERS))
        if split_of(letters) == split:
            drawn.setdefault(letters)
    return [{"prompt": letters + END_OF_PROMPT, "letters": letters} for letters in drawn]


def reward(task: Mapping[str, Any], completion: str) -> float:
    """1.0 if the completion is exactly the task's letters in ascending order, else 0.0."""
    return 1.0 if completion == "".join(sorted(task["letters"])) else 0.0
