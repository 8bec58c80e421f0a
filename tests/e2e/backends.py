"""Inference backends as processes of their own, beside a run that they feed."""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from leeway.rpc import cancel_and_wait
from leeway.service.ports import free_port
from tests.deadlines import WAIT_SECONDS

NODE_BACKEND = Path(__file__).parents[2] / "examples" / "node-backend"
_STARTED = b"serving"


class Backend:
    """One backend, which may be killed and started again at its address."""

    def __init__(self, command: Sequence[str], directory: Path) -> None:
        self.address = f"127.0.0.1:{free_port('127.0.0.1')}"
        self.starts = 0
        self._command = [part.replace("{address}", self.address) for part in command]
        self._directory = directory
        self._process: asyncio.subprocess.Process | None = None
        self._restart: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *self._command, cwd=self._directory, stdin=asyncio.subprocess.DEVNULL
        )
        self.starts += 1

    @property
    def running(self) -> bool:
        """Whether there is a process that a kill would meet."""
        return self._process is not None and self._process.returncode is None

    def kill(self) -> None:
        """SIGKILL; it is started again once it is gone."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._restart = asyncio.create_task(self._start_again(self._process))

    async def _start_again(self, process: asyncio.subprocess.Process) -> None:
        await process.wait()
        await self.start()

    async def stop(self) -> int:
        """SIGTERM; the exit code."""
        if self._restart is not None:
            await self._restart
        assert self._process is not None
        if self._process.returncode is None:
            self._process.terminate()
        waiting = asyncio.create_task(self._process.wait())
        await asyncio.wait([waiting], timeout=WAIT_SECONDS)
        if not waiting.done():
            self._process.kill()
            await cancel_and_wait(waiting)
            return await self._process.wait()
        return waiting.result()


@asynccontextmanager
async def running(*backends: Backend) -> AsyncGenerator[None]:
    """Backends that run within the block and stop cleanly at its end."""
    for backend in backends:
        await backend.start()
    try:
        yield
    finally:
        codes = [await backend.stop() for backend in backends]
    assert codes == [0] * len(backends)


def arithmetic_backend(*options: str) -> Backend:
    """The arithmetic engine behind the contract, without a worker."""
    flags = [part for option in options for part in ("--set", option)]
    command = [sys.executable, "-m", "tests.harness.arithmetic_backend", "--address", "{address}"]
    return Backend([*command, "--run", "rehearsal", *flags], NODE_BACKEND.parents[1])


def node_backend(*flags: str) -> Backend:
    """examples/node-backend; skips the test where it cannot be installed."""
    _require_node()
    return Backend(["node", "src/main.js", "--address", "{address}", *flags], NODE_BACKEND)


def node_command() -> str:
    """What starts it, for `leeway conformance --command`."""
    _require_node()
    return f"node {NODE_BACKEND / 'src' / 'main.js'} --address {{address}}"


def _require_node() -> None:
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    if (NODE_BACKEND / "node_modules" / "@grpc" / "grpc-js").is_dir():
        return
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    done = subprocess.run(command, cwd=NODE_BACKEND, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        pytest.skip(f"npm ci fails: {' '.join(done.stderr.split())[-300:]}")
