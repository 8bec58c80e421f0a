"""A run in an environment without the `report` extra."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from leeway.cli.main import main
from tests.deadlines import RUN_SECONDS
from tests.e2e.rehearsal import EXAMPLE

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(RUN_SECONDS)]


def test_it_ends_well_and_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "leeway.cli.curves", raising=False)
    arguments = ["run", str(EXAMPLE), "--plain", "--set", f"run.directory={tmp_path}", "--set", "run.steps=2"]
    assert main(arguments) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("rehearsal: 2 steps in ")
    assert said[-1].startswith("no report: ")
    assert "pip install 'leeway[report]'" in said[-1]
    run = tmp_path / "rehearsal"
    assert json.loads((run / "summary.json").read_text(encoding="utf-8"))["finished"]
    assert not (run / "report.html").exists()
    assert main(["report", str(run)]) == 2
    assert capsys.readouterr().err == f"leeway: {said[-1]}\n"
