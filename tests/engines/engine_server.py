"""One inference server as a process in its engine's own environment, spoken to over gRPC like any backend."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncGenerator, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import tomli_w

from inference_server.engines.remote import RemoteEngine
from leeway.errors import UnavailableError
from leeway.rpc import Security
from leeway.service.ports import free_port
from leeway.types import EngineInfo

CHECKOUT = Path(__file__).parents[2]
RUN = "run"  # the run of tests.harness.tiny_models.snapshot
START_SECONDS = 600.0  # of an engine, on a busy machine
_INSECURE = Security.from_files(None, None, None, insecure=True)


class EnvironmentMissingError(Exception):
    """An engine's environment is not there; says why."""


def interpreter(engine: str) -> str:
    """The interpreter of an engine's environment.

    Raises:
        EnvironmentMissingError: it has not been built.
    """
    if engine == "transformers":
        return sys.executable
    command = [sys.executable, str(CHECKOUT / "deploy" / "engines" / "build"), engine, "--if-built"]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode:
        raise EnvironmentMissingError(built.stderr.strip())
    return built.stdout.strip()


def engine_options(engine: str, *, gpu: bool = False, **options: Any) -> dict[str, Any]:
    """An engine's section: unless told otherwise float32, in which every engine computes the same, and small."""
    own: dict[str, Any] = {}
    if engine == "vllm" and not gpu:
        own = {"kv_cache_bytes": 1 << 26, "arguments": {"enforce_eager": True}}
    elif engine == "sglang" and not gpu:
        own = {"max_cached_tokens": 16384, "arguments": ["--mem-fraction-static", "0.3"]}
    return {"dtype": "float32", "max_concurrency": 4, **own, **options}


@dataclass(frozen=True, slots=True)
class EngineServer:
    """A running server."""

    engine: str
    address: str
    metrics_port: int
    log: Path
    process: subprocess.Popen[bytes]

    @contextlib.asynccontextmanager
    async def connect(self) -> AsyncGenerator[RemoteEngine, None]:
        """The server's engine, for the calling event loop; waits until it has started."""
        engine = await self._connected()
        try:
            yield engine
        finally:
            await engine.aclose()

    async def _connected(self) -> RemoteEngine:
        async with asyncio.timeout(START_SECONDS):
            while self.process.poll() is None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(5.0):
                        return await RemoteEngine.connect(self.address, _INSECURE)
        raise UnavailableError(f"the server has ended with code {self.process.returncode}; see {self.log}")

    async def info(self) -> EngineInfo:
        """What the server says of itself now; a connection remembers what it heard last."""
        async with self.connect() as engine:
            return engine.info()

    def metrics(self) -> dict[str, float]:
        return shown_metrics(self.metrics_port)


def shown_metrics(port: int) -> dict[str, float]:
    """What a server shows Prometheus, samples of one name summed."""
    values: dict[str, float] = {}
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=START_SECONDS) as page:
        for line in page.read().decode().splitlines():
            if line and not line.startswith("#"):
                name, value = line.rpartition(" ")[::2]
                values[name.split("{")[0]] = values.get(name.split("{")[0], 0.0) + float(value)
    return values


def configuration(engine: str, model: Path, directory: Path, **options: Any) -> dict[str, Any]:
    """A configuration that one server can start with; its run never opens."""
    return {
        "run": {
            "name": RUN,
            "directory": str(directory),
            "steps": 1,
            "groups_per_step": 1,
            "members": 1,
            "max_staleness": 0,
        },
        "model": {"path": str(model)},
        "task": {"train_file": "tasks.jsonl", "reward": "word_reward:score", "python_path": str(Path(__file__).parent)},
        "sampling": {"max_tokens": 8},
        "network": {
            "replay_buffer": f"127.0.0.1:{free_port('127.0.0.1')}",
            "policy": f"127.0.0.1:{free_port('127.0.0.1')}",
            "inference_servers": [f"127.0.0.1:{free_port('127.0.0.1')}"],
        },
        "metrics": {"inference_servers": [free_port("127.0.0.1")]},
        "evaluation": {"tasks": 0},
        "inference_server": {"engine": engine, engine: engine_options(engine, **options)},
    }


@contextlib.contextmanager
def engine_server(engine: str, model: Path, directory: Path, **options: Any) -> Generator[EngineServer, None, None]:
    """Start a server; it answers when `connect` does.

    Args:
        engine: its name in the configuration.
        model: what it loads.
        directory: for its configuration and its log.
        options: of the engine's section; `python` is the interpreter to start it with, `gpu` leaves sizes to it.

    Raises:
        EnvironmentMissingError: the engine's environment has not been built.
    """
    python = options.pop("python", None) or interpreter(engine)
    with started_server(engine, python, configuration(engine, model, directory, **options), directory) as server:
        yield server


@contextlib.contextmanager
def started_server(
    engine: str, python: str, settings: dict[str, Any], directory: Path
) -> Generator[EngineServer, None, None]:
    """Start a server with an interpreter and a configuration, which may have been started with before."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tasks.jsonl").write_text('{"prompt": "t2 t3"}\n', encoding="utf-8")
    path = directory / "server.toml"
    path.write_text(tomli_w.dumps(settings), encoding="utf-8")
    log = directory / "server.log"
    with log.open("ab") as log_file:
        # Ends with this process, however that ends: its stdin does.
        process = subprocess.Popen(
            [python, "-m", "inference_server", "--config", str(path), "--supervised"],
            cwd=CHECKOUT,
            stdin=subprocess.PIPE,
            stdout=log_file,
            stderr=log_file,
            start_new_session=True,
        )
    address, port = settings["network"]["inference_servers"][0], settings["metrics"]["inference_servers"][0]
    try:
        yield EngineServer(engine, address, port, log, process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
