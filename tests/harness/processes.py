"""Modules run as processes, as a person runs them."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager


@asynccontextmanager
async def running(module: str, *arguments: str) -> AsyncGenerator[asyncio.subprocess.Process]:
    """`python -m module`, killed at the end unless it has ended."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        # Its children hold its pipes' other ends no longer than they live.
        await process.communicate()


async def command(*arguments: str) -> tuple[int, str]:
    """`leeway ARGUMENTS`: exit code, and what it said on both streams."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "leeway.cli.main", *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    stdout, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, stdout.decode()
