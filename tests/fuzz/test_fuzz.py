"""The fuzzer in small, seeded; the long one is `make fuzz INPUTS=1000000`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.timeout(600), pytest.mark.processes]


async def test_no_input_brings_anything_but_leeway_errors() -> None:
    # A process of its own: its memory is bounded, and alarms interrupt it.
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.fuzz", "--inputs", "6000", "--seed", "1"),
        cwd=Path(__file__).parents[2],
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
