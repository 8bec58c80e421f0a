"""A real Prometheus, started for a test with deploy/prometheus.yml pointed at ports of this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import yaml

from leeway.service.ports import free_port

CONFIGURATION = Path(__file__).parents[2] / "deploy" / "prometheus.yml"


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 120.0) -> None:
    """Ask again and again: for programs that can be asked, but do not tell."""
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds:.0f} s: {what}")
        pause.wait(0.1)


def find_prometheus() -> str:
    """The program; without it a test is skipped, except in CI, which installs it."""
    program = shutil.which("prometheus")
    if program is None:
        reason = "the program `prometheus` is not installed (Debian: apt install prometheus)"
        if "CI" in os.environ:
            pytest.fail(reason)
        pytest.skip(reason)
    return program


class Prometheus:
    """A running server, to be asked with PromQL."""

    def __init__(self, port: int) -> None:
        self._root = f"http://127.0.0.1:{port}"

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The samples of an instant vector."""
        with urlopen(f"{self._root}/api/v1/query?{urlencode({'query': expression})}", timeout=30) as reply:
            return json.load(reply)["data"]["result"]

    def metric_names(self) -> set[str]:
        """The names of all series scraped so far."""
        with urlopen(f"{self._root}/api/v1/label/__name__/values", timeout=30) as reply:
            return set(json.load(reply)["data"])


def configure(targets: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """deploy/prometheus.yml with each job's targets replaced by ports of 127.0.0.1, scraped every second."""
    configuration = yaml.safe_load(CONFIGURATION.read_text(encoding="utf-8"))
    assert {job["job_name"] for job in configuration["scrape_configs"]} == set(targets)
    configuration["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s"}
    for job in configuration["scrape_configs"]:
        job["static_configs"] = [{"targets": [f"127.0.0.1:{port}" for port in targets[job["job_name"]]]}]
    return configuration


@contextmanager
def running_prometheus(directory: Path, targets: Mapping[str, Sequence[int]]) -> Generator[Prometheus]:
    """Run Prometheus against `targets` (job name -> ports) until the block ends."""
    program = find_prometheus()
    configuration = directory / "prometheus.yml"
    configuration.write_text(yaml.safe_dump(configure(targets)), encoding="utf-8")
    port = free_port("127.0.0.1")
    with (directory / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={configuration}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        wait_until(lambda: _ready(process, port, directory / "prometheus.log"), "Prometheus is ready")
        yield Prometheus(port)
    finally:
        process.terminate()
        process.wait(timeout=60)


def _ready(process: subprocess.Popen[bytes], port: int, log: Path) -> bool:
    if process.poll() is not None:
        pytest.fail(f"prometheus ended with {process.returncode}:\n{log.read_text(errors='replace')}")
    try:
        with urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=30) as reply:
            return reply.status == 200
    except OSError:
        return False
