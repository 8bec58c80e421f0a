"""Where the functions of a configuration are imported from."""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

import replay_buffer
from leeway.errors import ConfigError
from leeway.service.plugins import load_function


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_a_users_module_is_found_and_imports_its_neighbours(folder: Path) -> None:
    (folder / "own_words.py").write_text("WORD = 'here'\n")
    (folder / "own_reward.py").write_text("import own_words\ndef score(task, completion): return own_words.WORD\n")
    assert load_function("own_reward:score", folder)(None, None) == "here"


def test_a_users_module_hides_none_of_ours(folder: Path) -> None:
    (folder / "another_reward.py").write_text("def score(task, completion): return 1.0\n")
    (folder / "replay_buffer.py").write_text("raise SystemExit(0)\n")
    load_function("another_reward:score", folder)
    found = PathFinder.find_spec("replay_buffer")
    assert found is not None
    assert found.origin == replay_buffer.__file__


@pytest.mark.parametrize("name", ["learner", "statistics", "time"])
def test_a_users_module_with_a_name_that_is_taken_is_named(folder: Path, name: str) -> None:
    (folder / f"{name}.py").write_text("def score(task, completion): return 1.0\n")
    with pytest.raises(ConfigError, match=f"{name}:score: .* has a module {name}, but .* rename yours"):
        load_function(f"{name}:score", folder)
