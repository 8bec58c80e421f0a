"""docs/configuration.md and `leeway config` tell every key, as the models have it."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from leeway.cli.main import main
from leeway.config import load_configuration
from leeway.config.reference import markdown, sections
from tests.harness.configurations import EXAMPLE

PAGE = Path(__file__).parents[4] / "docs" / "configuration.md"


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == markdown(), "write it again: leeway config --markdown"


def test_every_key_is_described_by_a_sentence() -> None:
    keys = {f"{section.name}.{key.name}": key for section in sections() for key in section.keys}
    assert len(keys) > 150
    for name, key in keys.items():
        assert key.meaning[:1].isupper() or key.meaning.startswith("PEM"), name
        assert key.meaning.endswith("."), name
        assert key.type, name
    assert all(section.about.endswith(".") for section in sections())


def test_every_example_is_toml() -> None:
    for section in sections():
        assert tomllib.loads(section.example()), section.name


def test_the_terminal_shows_a_section_a_key_and_the_value_of_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: str) -> tuple[int, str]:
        code = main(["config", *arguments])
        output = capsys.readouterr()
        return code, output.out + output.err

    code, everything = said()
    assert code == 0
    assert all(len(line) <= 80 for line in everything.splitlines())
    assert "[learner.fleet]" in everything
    code, one = said("run.max_staleness")
    assert one.startswith("run.max_staleness\n    integer; \u2265 0, \u2264 1000; required\n")
    assert said("--file", str(EXAMPLE), "run.max_staleness") == (0, "2\n")
    assert said("--file", str(EXAMPLE), "--set", "run.steps=7", "run.steps") == (0, "7\n")
    _, learner = said("--file", str(EXAMPLE), "learner")
    assert tomllib.loads(learner)["trainer"] == "arithmetic"
    assert said("--file", str(EXAMPLE), "model.path") == (0, "\n")
    assert said("run.stepz") == (1, "leeway: run.stepz: no such section or key; `leeway config` lists all\n")
    assert said("--file", str(EXAMPLE), "run.stepz")[0] == 1


def test_what_a_file_resolves_to_is_read_back_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--file", str(EXAMPLE)]) == 0
    path = tmp_path / "resolved.toml"
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    assert load_configuration(path).model_dump() == load_configuration(EXAMPLE).model_dump()
