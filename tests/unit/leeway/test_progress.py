"""What `leeway run` shows of a server that is taken out of the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from leeway.cli.progress import open_progress
from leeway.config import RunOptions


@pytest.mark.parametrize("plain", [True, False])
def test_a_drained_server_is_named(plain: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {
        "name": "r",
        "directory": str(tmp_path),
        "steps": 9,
        "groups_per_step": 1,
        "members": 1,
        "max_staleness": 1,
    }
    run = RunOptions.model_validate(values, context={"directory": tmp_path})
    drain = {"kind": "drain", "step": 3, "server": "odd", "reason": "diverging", "message": "2 nats from the others"}
    with open_progress(run, plain=plain) as progress:
        progress.on_journal_line(json.dumps({**drain, "elapsed_seconds": 1.0}))
    output = capsys.readouterr()
    assert "odd is drained (diverging): 2 nats from the others" in output.out + output.err
