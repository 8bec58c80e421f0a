"""Server processes of the contenders: started, measured, killed."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

from leeway.config import load_configuration
from leeway.service.ports import free_port

ROOT: Final = Path(__file__).parents[2]
PEERS: Final = Path(__file__).parent / "peers"
_TICKS: Final = os.sysconf("SC_CLK_TCK")


class MissingPeer(Exception):
    """A contender cannot be had here; says why."""


class Server:
    """A process with its log file; killed when the block that started it ends."""

    def __init__(self, command: Sequence[str], log_file: Path, cpus: Sequence[int] = ()) -> None:
        self._command = [*(["taskset", "-c", ",".join(map(str, cpus))] if cpus else []), *command]
        self._log_file = log_file
        self.start()

    def start(self) -> None:
        """Start it, again if need be."""
        with self._log_file.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=ROOT, start_new_session=True
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def cpu_seconds(self) -> float:
        """User and system time so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def memory_bytes(self) -> int:
        """Resident memory that is its own, without file pages."""
        for line in Path(f"/proc/{self.pid}/status").read_text(encoding="ascii").splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) << 10
        return 0

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(30)

    def check(self) -> None:
        """Raise when it has ended."""
        if self._process.poll() is not None:
            tail = self._log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-3:]
            raise RuntimeError(f"{self._command} ended with {self._process.returncode}: {' / '.join(tail)}")


@contextmanager
def killed_at_end(server: Server) -> Iterator[Server]:
    """The server, for the time of a block."""
    try:
        yield server
    finally:
        server.kill()


def replay_buffer(
    directory: Path,
    port: int,
    *,
    module: str = "replay_buffer",
    cpus: Sequence[int] = (),
    arguments: Sequence[str] = (),
) -> Server:
    """The service as it is run by everybody, on an empty or existing directory."""
    directory.mkdir(parents=True, exist_ok=True)
    config = directory / "run.toml"
    load_configuration(
        ROOT / "examples" / "rehearsal.toml", [f"replay_buffer.directory={directory.resolve() / 'log'}"]
    ).write(config)
    settings = [f"network.replay_buffer=127.0.0.1:{port}", f"metrics.replay_buffer={free_port('127.0.0.1')}"]
    command = [sys.executable, "-m", module, "--config", str(config), *(f"--set={one}" for one in settings), *arguments]
    return Server(command, directory / "server.log", cpus)


def bare_server(directory: Path, port: int) -> Server:
    """The stream that only counts."""
    directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.replay_buffer.bare_server", str(port)]
    return Server(command, directory / "server.log")


def kept_server(directory: Path, port: int) -> Server:
    """The stream that keeps what comes, and decides nothing."""
    directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.replay_buffer.kept_server", str(port), str(directory.resolve())]
    return Server(command, directory / "server.log")


def redis_server(directory: Path, port: int) -> Server:
    """Redis or Valkey of the distribution, each command durable before its answer.

    Raises:
        MissingPeer: neither is installed.
    """
    program = shutil.which("valkey-server") or shutil.which("redis-server")
    if program is None:
        raise MissingPeer("neither valkey-server nor redis-server is installed (apt-get install redis-server)")
    directory.mkdir(parents=True, exist_ok=True)
    settings = {
        "port": port,
        "bind": "127.0.0.1",
        "dir": directory.resolve(),
        "appendonly": "yes",
        "appendfsync": "always",
        "auto-aof-rewrite-percentage": 0,
        "daemonize": "no",
    }
    command = [program, *(str(word) for key, value in settings.items() for word in (f"--{key}", value)), "--save", ""]
    return Server(command, directory / "server.log")


def reverb_server(python: Path, directory: Path, port: int) -> Server:
    """Reverb's server in its own environment."""
    directory.mkdir(parents=True, exist_ok=True)
    command = [str(python), str(PEERS / "reverb_peer.py"), "serve", str(port), str(directory / "checkpoints")]
    return Server(command, directory / "server.log")


async def listening(host: str, port: int, timeout_seconds: float = 60.0) -> None:
    """Wait until somebody listens there; a server of another make has no other sign of being ready."""
    async with asyncio.timeout(timeout_seconds):
        while True:
            try:
                _, writer = await asyncio.open_connection(host, port)
            except OSError:
                await asyncio.sleep(0.02)
            else:
                writer.close()
                return


class Driver:
    """A peer's client in its own environment: orders as JSON lines, answers as JSON lines."""

    def __init__(self, python: Path, script: str, port: int, log_file: Path) -> None:
        self._log = log_file.open("ab")
        self._process = subprocess.Popen(
            [str(python), str(PEERS / script), "drive", str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._orders: IO[str] = self._process.stdin
        self._answers: IO[str] = self._process.stdout
        self._read()

    def order(self, op: str, **arguments: int) -> Mapping[str, Any]:
        """Have something done; its answer has at least `seconds` and `cpu_seconds`."""
        self._orders.write(json.dumps({"op": op, **arguments}) + "\n")
        self._orders.flush()
        return self._read()

    def _read(self) -> Mapping[str, Any]:
        line = self._answers.readline()
        if not line:
            raise RuntimeError(f"a peer's client ended; see {self._log.name}")
        return json.loads(line)

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait(30)
        self._log.close()


def environment(name: str, folder: Path) -> Path:
    """The interpreter of a peer's environment, made from peers/NAME.txt when it is missing.

    Raises:
        MissingPeer: it cannot be made.
    """
    python = folder / name / "bin" / "python"
    complete = folder / name / "complete"
    if complete.exists():
        return python
    base = sys.executable if sys.version_info[:2] == (3, 11) else shutil.which("python3.11")
    if base is None:
        raise MissingPeer(f"{name} needs Python 3.11 to make its environment")
    try:
        subprocess.run([base, "-m", "venv", "--clear", str(folder / name)], check=True)
        subprocess.run(
            [
                str(python),
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
                "-r",
                f"{PEERS / name}.txt",
            ],
            check=True,
            timeout=600,
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise MissingPeer(f"the environment of {name} cannot be made: {error}") from error
    complete.touch()
    return python
