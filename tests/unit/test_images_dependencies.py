"""Each image of deploy/ holds only what its extra installs: what runs in it must start without the rest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.deadlines import WAIT_SECONDS

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
OF_A_MODEL = ("torch", "transformers", "tokenizers")
OF_THE_REPORT = ("matplotlib",)

# Runs a module as `python -m` does, with some packages made impossible to import.
PROGRAM = """
import runpy, sys

packages, module, *arguments = sys.argv[1:]
sys.modules.update(dict.fromkeys(packages.split(",")))
sys.argv = [module, *arguments]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def run_without(packages: tuple[str, ...], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, ",".join(packages), *command],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        check=False,
    )


@pytest.mark.parametrize(
    ("packages", "command"),
    [
        pytest.param(OF_A_MODEL + OF_THE_REPORT, ("replay_buffer", "--help"), id="replay_buffer"),
        pytest.param(OF_THE_REPORT, ("learner", "--help"), id="learner"),
        pytest.param(OF_THE_REPORT, ("inference_server", "--help"), id="inference_server"),
        pytest.param(OF_A_MODEL + OF_THE_REPORT, ("leeway.cli.main", "health", "--help"), id="health"),
    ],
)
def test_starts_with_what_its_image_holds(packages: tuple[str, ...], command: tuple[str, ...]) -> None:
    process = run_without(packages, *command)
    assert process.returncode == 0, process.stderr
    assert "usage:" in process.stdout
