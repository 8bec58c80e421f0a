"""What `leeway run` takes for a configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from leeway.cli.run_folder import load_run_document
from leeway.errors import ConfigError

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_example_is_found_by_name_and_its_run_lies_in_the_working_directory(folder: Path) -> None:
    document = load_run_document(Path("rehearsal"), ["run.steps=3"])
    assert document.path == EXAMPLES / "rehearsal.toml"
    assert document.values["run"]["directory"] == str(folder / "runs")
    assert document.values["run"]["steps"] == 3
    assert load_run_document(Path("rehearsal"), ["run.directory=here"]).values["run"]["directory"] == "here"


def test_a_file_comes_before_an_example_of_its_name(folder: Path) -> None:
    (folder / "rehearsal").write_text("[run]\nsteps = 7\n")
    document = load_run_document(Path("rehearsal"), [])
    assert document.values == {"run": {"steps": 7}}


def test_an_unknown_name_lists_the_examples() -> None:
    with pytest.raises(ConfigError, match=r"sortmix9: .* rehearsal, sortmix8, sortmix8-dense"):
        load_run_document(Path("sortmix9"), [])


@pytest.mark.parametrize("path", ["sortmix9.toml", "folder/sortmix8"])
def test_what_looks_like_a_path_is_one(path: str) -> None:
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        load_run_document(Path(path), [])
