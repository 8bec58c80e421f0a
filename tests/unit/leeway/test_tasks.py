"""Tasks from a file: their tags, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from leeway.config import TaskOptions
from leeway.errors import ConfigError
from leeway.tasks import TaskSet, load_tasks


def loaded(folder: Path, tasks: Sequence[Any]) -> TaskSet:
    file = folder / "tasks.jsonl"
    file.write_text("\n".join(map(json.dumps, tasks)), encoding="utf-8")
    return load_tasks(TaskOptions.model_validate({"train_file": file, "reward": "module:reward"}), 0)


def test_a_task_has_the_tags_of_its_line(tmp_path: Path) -> None:
    tasks = loaded(tmp_path, [{"prompt": "a", "tags": ["easy", "sums"]}, {"prompt": "b"}])
    assert [tasks.train_tags(index) for index in (0, 1)] == [("easy", "sums"), ()]
    assert tasks.digest != loaded(tmp_path, [{"prompt": "a", "tags": ["hard", "sums"]}, {"prompt": "b"}]).digest


@pytest.mark.parametrize("tags", ["easy", ["easy", 1], [""], ["x" * 65], None, {"easy": 1}])
def test_tags_are_a_list_of_short_labels(tmp_path: Path, tags: Any) -> None:
    with pytest.raises(ConfigError, match=r"tasks\.jsonl:2: `tags`"):
        loaded(tmp_path, [{"prompt": "a"}, {"prompt": "b", "tags": tags}])


def test_the_number_of_different_tags_is_bounded(tmp_path: Path) -> None:
    labels = [f"tag-{number}" for number in range(65)]
    assert loaded(tmp_path, [{"prompt": "a", "tags": labels[:64]}] * 3).train_tags(2) == tuple(labels[:64])
    with pytest.raises(ConfigError, match="65 different tags"):
        loaded(tmp_path, [{"prompt": "a", "tags": [label]} for label in labels])
