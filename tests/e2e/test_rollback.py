"""`leeway buffer rollback` beside a run that is going: the learner is fenced, the run goes on from the checkpoint."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path

import pytest

from learner.run_artifacts.checkpoint import CheckpointStore
from learner.run_artifacts.journal import read_journal
from tests.e2e.rehearsal import EXAMPLE, SMALL
from tests.harness.processes import CLI, children_of, command_line, leeway, overriding, running

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

STEPS = 40
BACK_TO = 5


async def test_a_run_that_is_rolled_back_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "rehearsal"
    overrides = [
        *SMALL,
        f"run.steps={STEPS}",
        f"run.directory={tmp_path}",
        "learner.checkpoint_every_steps=5",
        "learner.keep_checkpoints=100",
        "evaluation.every_steps=10",
        "inference_server.arithmetic.token_seconds=0.008",
    ]
    async with running(CLI, "run", str(EXAMPLE), "--plain", *overriding(overrides)) as process:
        assert process.stderr is not None
        while line := (await process.stderr.readline()).decode():
            if line.startswith("step 10: held-out"):
                break
        store = CheckpointStore(run / "checkpoints", keep=100)
        (learner,) = [child for child in children_of(process.pid) if "learner" in command_line(child)]
        os.kill(learner, signal.SIGSTOP)  # or the run may be at its end before the command is
        returned = await asyncio.to_thread(leeway, "buffer", "rollback", str(run), str(BACK_TO))
        os.kill(learner, signal.SIGCONT)
        assert returned.returncode == 0, returned.stderr
        assert returned.stdout.startswith(f"rolled back to step {BACK_TO} (rehearsal/1.{BACK_TO}@")
        _, stderr = await process.communicate()
    assert process.returncode == 0, stderr.decode()
    records = [record for record in read_journal(run / "metrics.jsonl") if record["kind"] == "step"]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    epochs = [int(record["version"].split("/")[1].split(".")[0]) for record in records]
    assert epochs == [1] * BACK_TO + [3] * (STEPS - BACK_TO)  # epoch 2 is the rollback's own
    summary = json.loads((run / "summary.json").read_text())
    assert summary["finished"]
    assert summary["groups_consumed"] == 4 * STEPS
    assert summary["dropped_groups"]["rolled_back"] >= 4 * (10 - BACK_TO)
    assert summary["groups_issued"] == summary["groups_consumed"] + sum(summary["dropped_groups"].values())
    assert {store.load(step).version.epoch for step in store.steps() if step > BACK_TO} == {3}
    missing = await asyncio.to_thread(leeway, "buffer", "rollback", str(run), str(BACK_TO + 1))
    assert (missing.returncode, missing.stderr.count("0, 5, 10")) == (1, 1), missing.stderr
    letters = await asyncio.to_thread(leeway, "buffer", "dead-letters", str(run))
    assert (letters.returncode, letters.stdout) == (0, "no dead letters\n")
