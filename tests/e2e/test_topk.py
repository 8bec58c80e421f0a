"""A run on top-K divergences: the real engine's candidates through the buffer to the learner, and back from the log."""

from __future__ import annotations

from pathlib import Path

import pytest

from learner.run_artifacts.journal import read_journal
from tests.harness.processes import leeway, overriding

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

OVERRIDES = (
    "run.steps=4",
    "run.groups_per_step=6",
    "sampling.topk=20",
    "learner.training.algorithm=dppo-topk-tv",
    "evaluation.tasks=0",
    "network.replay_buffer=127.0.0.1:0",
    "network.policy=127.0.0.1:0",
    'network.inference_servers=["127.0.0.1:0"]',
    "metrics.replay_buffer=0",
    "metrics.learner=0",
    "metrics.inference_servers=[0]",
)


def test_candidates_agree_with_the_learner_where_nothing_is_stale(tmp_path: Path) -> None:
    overrides = overriding((*OVERRIDES, f"run.directory={tmp_path}"))
    finished = leeway("run", "examples/sortmix8.toml", *overrides)
    assert finished.returncode == 0, finished.stderr
    steps = [record for record in read_journal(tmp_path / "sortmix8" / "metrics.jsonl") if record["kind"] == "step"]
    assert len(steps) == 4
    # The first step is all fresh: the divergence over candidates and the rest is numerics alone.
    assert steps[0]["staleness_histogram"].keys() == {"0"}
    assert 0 < steps[0]["mismatch"] < 1e-5
    assert steps[0]["topk_policy_mass"] == pytest.approx(steps[0]["topk_behavior_mass"], abs=1e-5)
    assert all(0.9 < step["topk_behavior_mass"] <= 1 + 1e-6 for step in steps)
    replayed = leeway("recompute-step", str(tmp_path / "sortmix8"), "4")
    assert replayed.returncode == 0, replayed.stderr
