"""What every command says of itself fits a terminal of 80 columns, and reads as text."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import pytest

from leeway.cli.main import COMMANDS, build_parser, main

SERVICES = ("replay-buffer", "learner", "inference-server")


def commands(parser: argparse.ArgumentParser, name: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command, groups included."""
    yield name
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, subparser in action.choices.items():
                yield from commands(subparser, (*name, word))


EVERY = [*commands(build_parser()), *(("serve", service) for service in SERVICES)]


@pytest.mark.parametrize("command", EVERY, ids=" ".join)
def test_help_reads_well_at_80_columns(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if len(line) > 80] == []
    assert not set("│─▼▲►◄┌└├") & set(said), "a drawing was taken for text"
    description = said.partition("\n\n")[2].partition("\n\n")[0]
    assert description.rstrip().endswith("."), "a command is described in sentences"


def test_every_summary_is_a_phrase() -> None:
    for summary in COMMANDS.values():
        assert summary[0].islower()
        assert not summary.endswith(".")
