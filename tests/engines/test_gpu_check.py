"""The script for GPUs, as far as it goes without one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engines import gpu_check
from tests.engines.gpu_check import Report


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    python.chmod(0o755)
    assert gpu_check.main(["--python", str(python)]) == 2
    assert "sees no GPU" in capsys.readouterr().out


def test_its_assertions_hold_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    code = gpu_check.main(["--engine", "transformers", "--on-cpu"])
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert printed.count("ok  ") > 20
    assert "rows of routing" in printed
    assert "swap in flight: tokens before it" in printed


def test_what_does_not_hold_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report()
    report.expect("right", 1.0, holds=True)
    report.expect("wrong", 2.0, holds=False)
    assert report.failures == 1
    assert "FAIL wrong: 2" in capsys.readouterr().out
