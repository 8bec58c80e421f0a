"""proto/baseline.py says what changed in the contract, and refuses what breaks callers."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

PROTO = Path(__file__).parents[2] / "proto"


def compare(tmp_path: Path, pattern: str, replacement: str) -> subprocess.CompletedProcess[str]:
    """Compare a copy of the contract, with the first match in inference.proto replaced."""
    contract = tmp_path / "proto"
    shutil.copytree(PROTO, contract)
    file = contract / "leeway" / "v1" / "inference.proto"
    text, count = re.subn(pattern, replacement, file.read_text(encoding="utf-8"), count=1, flags=re.MULTILINE)
    assert count == 1
    file.write_text(text, encoding="utf-8")
    command = [sys.executable, str(PROTO / "baseline.py"), "--contract", str(contract)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize(
    ("pattern", "replacement", "removed"),
    [
        pytest.param(r"^  rpc GetServerInfo\(.*$", "", "- call leeway.v1.InferenceService.GetServerInfo", id="a call"),
        pytest.param(
            r" max_topk = 5;", " max_topk = 45;", "- field leeway.v1.GetServerInfoResponse.max_topk = 5", id="a number"
        ),
    ],
)
def test_what_breaks_callers_is_refused_by_name(tmp_path: Path, pattern: str, replacement: str, removed: str) -> None:
    result = compare(tmp_path, pattern, replacement)
    assert result.returncode == 1, result
    assert removed in result.stdout
    assert "CHANGELOG.md" in result.stderr


def test_an_addition_is_named_and_passes(tmp_path: Path) -> None:
    result = compare(
        tmp_path, r"^message GetServerInfoRequest \{", "message GetServerInfoRequest {\n  int32 extra = 99;\n"
    )
    assert result.returncode == 0, result
    assert "+ field leeway.v1.GetServerInfoRequest.extra = 99 (int32)" in result.stdout
