"""A learner of two ranks in a whole run: real processes, the model of the first example."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.own_modules import add_own_modules, imported
from tests.harness.processes import leeway, overriding

SMALL = (
    "run.steps=4",
    "run.groups_per_step=3",
    "evaluation.tasks=0",
    "learner.ranks=2",
    "learner.checkpoint_every_steps=2",
    "network.replay_buffer=127.0.0.1:0",
    "network.policy=127.0.0.1:0",
    'network.inference_servers=["127.0.0.1:0"]',
    "metrics.replay_buffer=0",
    "metrics.learner=0",
    "metrics.inference_servers=[0]",
)


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_a_run_with_two_ranks(tmp_path: Path) -> None:
    add_own_modules(tmp_path)  # torchrun starts no rank with them
    finished = leeway("run", "sortmix8", *overriding(SMALL), directory=tmp_path)
    assert finished.returncode == 0, finished.stderr
    run = tmp_path / "runs" / "sortmix8"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["finished"]
    assert summary["groups_consumed"] == 12
    assert len(list((run / "checkpoints" / "step-00000004" / "weights").glob("shard-*"))) == 2
    exported = leeway("export", str(run), "4", directory=tmp_path)  # one process reads what two wrote
    assert exported.returncode == 0, exported.stderr
    assert (run / "export" / "step-4" / "model.safetensors").is_file()
    replayed = leeway("recompute-step", str(run), "4", directory=tmp_path)
    assert replayed.returncode == 0, replayed.stderr
    assert "starting from the checkpoint of step 2" in replayed.stdout
    assert replayed.stdout.endswith("equal: step 4 gives the same statistics and weights, bit for bit\n")
    missing = leeway("recompute-step", str(run), "9", directory=tmp_path)
    assert missing.returncode == 2
    assert missing.stderr.startswith("leeway: ")
    assert "no receipt of step 9" in missing.stderr
    assert len(missing.stderr.splitlines()) == 1
    assert imported(tmp_path) == ""
