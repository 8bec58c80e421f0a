"""Servers with different engines feed one run: each in its own environment, all under one supervisor.

The learning rate is nothing, so every version computes the same: whatever the engine, however stale, the learner must
find the log-probs that the engine sampled from.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
from collections import Counter
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import tomli_w

from learner.run_artifacts.journal import read_journal
from leeway.cli.replay_access import open_replay
from leeway.service.ports import free_port
from leeway.trajectory.assembly import assemble_trajectory
from leeway.types import GroupState
from tests.engines.conftest import ENGINES, make_model
from tests.engines.engine_server import (
    CHECKOUT,
    EnvironmentMissingError,
    engine_options,
    interpreter,
)
from tests.harness import tiny_models

NOTHING = 1e-12


def configuration(directory: Path, metrics_port: int) -> Path:
    model = tiny_models.save(make_model(0), directory / "model")
    tasks = [{"prompt": f"t{number} t{number + 1} t{number + 2}"} for number in range(2, 200)]
    (directory / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks), encoding="utf-8")
    sections = {
        "run": {
            "name": "mixed",
            "directory": str(directory),
            "steps": 100_000,
            "groups_per_step": 4,
            "members": 4,
            "max_staleness": 4,
        },
        "model": {"path": str(model)},
        "task": {"train_file": "tasks.jsonl", "reward": "word_reward:score", "python_path": str(Path(__file__).parent)},
        "sampling": {"max_tokens": 48, "routing": True, "topk": 5, "temperature": 0.9},
        "network": {
            "replay_buffer": "127.0.0.1:0",
            "policy": "127.0.0.1:0",
            "inference_servers": ["127.0.0.1:0"] * len(ENGINES),
        },
        "metrics": {"replay_buffer": 0, "learner": metrics_port, "inference_servers": [0] * len(ENGINES)},
        "evaluation": {"tasks": 0, "members": 1},
        "inference_server": {
            "engines": list(ENGINES),
            "worker": {"prefetch": 0},
            **{
                engine: engine_options(engine) | ({} if engine == "transformers" else {"python": interpreter(engine)})
                for engine in ENGINES
            },
        },
        "learner": {
            "training": {"learning_rate": NOTHING, "routing_replay": True, "publish_dtype": "float32"},
            "fleet": {"min_tokens": 1},
        },
    }
    path = directory / "mixed.toml"
    path.write_text(tomli_w.dumps(sections), encoding="utf-8")
    return path


def trained_servers(port: int) -> set[str]:
    """Servers whose tokens the learner has trained on of late, as it says; none while it starts."""
    try:
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
            text = page.read().decode()
    except (URLError, ConnectionError, TimeoutError):
        return set()
    return set(re.findall(r'^leeway_learner_server_mismatch_nats{server="([^"]+)"}', text, re.MULTILINE))


async def test_the_learner_computes_what_each_engine_sampled(tmp_path: Path) -> None:
    metrics_port = free_port("127.0.0.1")
    try:
        path = configuration(tmp_path, metrics_port)
    except EnvironmentMissingError as missing:
        pytest.skip(str(missing))
    log_path = tmp_path / "run.log"
    with log_path.open("wb") as log:
        run = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "leeway.cli.main", "run", str(path), "--plain"),
            cwd=CHECKOUT,
            stdout=log,
            stderr=log,
        )
        try:
            async with asyncio.timeout(1100):
                seen = set[str]()
                while len(seen) < len(ENGINES):
                    assert run.returncode is None, log_path.read_text(encoding="utf-8")
                    await asyncio.sleep(1.0)
                    seen |= await asyncio.to_thread(trained_servers, metrics_port)
                run.send_signal(signal.SIGINT)
                assert await run.wait() == 0, log_path.read_text(encoding="utf-8")
        finally:
            if run.returncode is None:
                run.kill()
                await run.wait()
    steps = [record for record in read_journal(tmp_path / "mixed" / "metrics.jsonl") if record["kind"] == "step"]
    assert max(step["max_abs_policy_behavior_difference"] for step in steps) < 1e-4
    assert max(step["ratio_max"] for step in steps) < 1.001
    trained = Counter[str]()
    async with open_replay(tmp_path / "mixed" / "config.toml") as client:
        async for group in client.export_groups(state=GroupState.CONSUMED):
            for record in group.trajectories:
                segments = assemble_trajectory(record).segments
                trained.update(segment.engine.split("/")[0] for segment in segments if segment.engine)
    assert set(trained) == set(ENGINES), trained
