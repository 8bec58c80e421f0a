"""The tasks of a run: training and held-out, from a generator function or from JSONL, with one digest.

A task is an object with a `prompt`. Its `tags`, if it has any, are short labels by which the learner reports rewards;
other keys are the reward function's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from leeway.config import TaskOptions
from leeway.errors import ConfigError
from leeway.service.plugins import load_function

Task = Mapping[str, Any]

_MOST_TAGS: Final = 64
"""Different tags of a run's tasks: each is a series of a metric."""
_MOST_TAG_LETTERS: Final = 64


@dataclass(frozen=True, slots=True)
class TaskSet:
    """Tasks by index; `digest` covers all of them and the reward's name."""

    train: Sequence[Task]
    heldout: Sequence[Task]
    digest: bytes

    def train_tags(self, task_index: int) -> tuple[str, ...]:
        """The tags of a training task."""
        return tuple(self.train[task_index].get("tags", ()))


def load_tasks(options: TaskOptions, seed: int) -> TaskSet:
    """Load or generate the tasks.

    Raises:
        ConfigError: a file is unreadable, a line is not an object with a `prompt` string, or the function misbehaves.
    """
    if options.tasks is not None:
        generate = load_function(options.tasks, options.python_path)
        train: Sequence[Task] = generate("train", options.train_count, seed)
        heldout: Sequence[Task] = generate("heldout", options.heldout_count, seed)
        for index, task in enumerate([*train, *heldout]):
            _check(task, f"{options.tasks}: task {index}")
    else:
        train = _read_jsonl(options.train_file)
        heldout = _read_jsonl(options.heldout_file)
    if not train:
        raise ConfigError("task: there are no training tasks")
    tags = {tag for task in train for tag in task.get("tags", ())}
    if len(tags) > _MOST_TAGS:
        raise ConfigError(f"task: the training tasks have {len(tags)} different tags; at most {_MOST_TAGS}")
    return TaskSet(train, heldout, _digest(train, heldout, options.reward))


def _read_jsonl(path: Path | None) -> list[Task]:
    if path is None:
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read tasks: {error}") from error
    tasks: list[Task] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            task = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}:{number}: not JSON: {error}") from error
        _check(task, f"{path}:{number}")
        tasks.append(task)
    return tasks


def _check(task: object, where: str) -> None:
    if not isinstance(task, Mapping) or not isinstance(cast("Task", task).get("prompt"), str):
        raise ConfigError(f"{where}: a task is an object with a `prompt` string")
    tags: Any = cast("Task", task).get("tags", ())
    if not isinstance(tags, (list, tuple)) or not all(_is_tag(tag) for tag in cast("Sequence[object]", tags)):
        raise ConfigError(f"{where}: `tags` is a list of labels of 1 to {_MOST_TAG_LETTERS} characters")


def _is_tag(tag: object) -> bool:
    return isinstance(tag, str) and 1 <= len(tag) <= _MOST_TAG_LETTERS


def _digest(train: Sequence[Task], heldout: Sequence[Task], reward: str) -> bytes:
    document = {"train": list(train), "heldout": list(heldout), "reward": reward}
    return hashlib.sha256(json.dumps(document, sort_keys=True, ensure_ascii=False).encode()).digest()
