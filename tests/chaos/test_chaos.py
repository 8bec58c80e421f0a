"""The chaos suite in small, and tests of it: each planted bug is found by an invariant that it breaks.

The long one is `make chaos KILLS=200`.
"""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

import pytest

from tests.chaos.planted import BUGS

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

KILLS = 12
SEEDS = ("1", "2", "3")


async def conduct(directory: Path, *arguments: str) -> tuple[int, str]:
    """The suite in a process of its own, since it forks: its exit code and what it printed."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.chaos", "--directory", str(directory), *arguments),
        cwd=Path(__file__).parents[2],
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


def violated(output: str) -> set[int]:
    """Invariants with violations, by the last line."""
    counts = re.findall(r"(\d+):(\d+)", output.splitlines()[-1].rpartition("violations: ")[2])
    assert [int(number) for number, _ in counts] == list(range(1, 13)), output
    return {int(number) for number, count in counts if int(count)}


async def test_nothing_is_violated_under_fire(tmp_path: Path) -> None:
    code, output = await conduct(tmp_path, "--kills", str(KILLS), "--seed", "5")
    assert (code, violated(output)) == (0, set()), output


@pytest.mark.parametrize("name", sorted(BUGS))
async def test_a_planted_bug_is_found(tmp_path: Path, name: str) -> None:
    output = ""
    for seed in SEEDS[:1] if BUGS[name].certain else SEEDS:
        code, output = await conduct(tmp_path / seed, "--plant", name, "--seed", seed)
        if code == 1 and violated(output) & set(BUGS[name].invariants):
            return
    pytest.fail(output)
