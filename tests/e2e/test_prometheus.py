"""deploy/prometheus.yml, in a real Prometheus, finds the metrics of every service."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, start_http_server

from leeway.metrics import InferenceServerMetrics, LearnerMetrics
from tests.e2e.prometheus import free_port, running_prometheus, wait_until

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]


@pytest.fixture
def replay_buffer_port(tmp_path: Path) -> Iterator[int]:
    """The metrics port of a real `python -m replay_buffer`."""
    port = free_port()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "replay_buffer"),
            f"--config={ROOT / 'examples' / 'sortmix8.toml'}",
            f"--set=run.directory={tmp_path / 'runs'}",
            f"--set=replay_buffer.directory={tmp_path / 'replay'}",
            f"--set=network.replay_buffer=127.0.0.1:{free_port()}",
            f"--set=metrics.replay_buffer={port}",
        ],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
    )
    yield port
    process.terminate()
    assert process.wait(timeout=20) == 0, "a clean stop ends with exit code 0"


@pytest.fixture
def learner_port() -> Iterator[int]:
    """The learner's metrics, without a learner."""
    registry = CollectorRegistry()
    LearnerMetrics(registry)
    yield from _serve(registry)


@pytest.fixture
def inference_server_port() -> Iterator[int]:
    """An inference server's metrics, without a model."""
    registry = CollectorRegistry()
    InferenceServerMetrics(registry)
    yield from _serve(registry)


def _serve(registry: CollectorRegistry) -> Iterator[int]:
    port = free_port()
    server, thread = start_http_server(port, addr="127.0.0.1", registry=registry)
    yield port
    server.shutdown()
    server.server_close()
    thread.join(timeout=20)


def test_every_service_is_scraped(
    tmp_path: Path, replay_buffer_port: int, learner_port: int, inference_server_port: int
) -> None:
    targets = {
        "replay_buffer": [replay_buffer_port],
        "learner": [learner_port],
        "inference_server": [inference_server_port],
    }
    with running_prometheus(tmp_path, targets) as prometheus:
        for job in targets:
            wait_until(lambda job=job: bool(prometheus.query(f'up{{job="{job}"}} == 1')), f"{job} is scraped")
        for job, metric in [
            ("replay_buffer", "leeway_replay_log_bytes"),
            ("learner", "leeway_learner_step"),
            ("inference_server", "leeway_inference_policy_step"),
        ]:
            assert prometheus.query(f'{metric}{{job="{job}"}}'), f"{metric} is missing from job {job}"
