"""The tasks of a run: training and held-out, from a generator function or from JSONL, with one digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from leeway.config import TaskOptions
from leeway.errors import ConfigError
from leeway.service.plugins import load_function

Task = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TaskSet:
    """Tasks by index; `digest` covers all of them and the reward's name."""

    train: Sequence[Task]
    heldout: Sequence[Task]
    digest: bytes


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


def _digest(train: Sequence[Task], heldout: Sequence[Task], reward: str) -> bytes:
    document = {"train": list(train), "heldout": list(heldout), "reward": reward}
    return hashlib.sha256(json.dumps(document, sort_keys=True, ensure_ascii=False).encode()).digest()
