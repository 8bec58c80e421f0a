"""Over a fixed log of groups on one machine, a learner stopped or killed ends with the bits of one never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from learner.run_artifacts.checkpoint import CheckpointStore
from learner.run_artifacts.journal import read_journal
from learner.run_artifacts.receipts import read_receipts
from tests.contract.learner_run import STEPS, CrashError, LearnerRun
from tests.harness.buffer_server import serving, serving_buffer


def tensors(run: LearnerRun) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint: weights and moments."""
    folder = run.directory / "checkpoints" / f"step-{STEPS:08d}"
    files = sorted(folder.rglob("*.safetensors"))
    assert files
    return {f"{file.parent.name}/{name}": value for file in files for name, value in load_file(file).items()}


def story(run: LearnerRun) -> list[Any]:
    """Per step: its groups, its statistics, and the digest of what came out."""
    steps = read_receipts(run.directory).steps
    return [(steps[s].groups, steps[s].statistics, steps[s].version.split("@")[1]) for s in sorted(steps)]


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("interruption", [{"until": 2}, {"until": 3}, {"crash_at": 4}], ids=str)
async def test_a_restart_changes_no_bit(tmp_path: Path, interruption: dict[str, int], moe: bool) -> None:
    async with serving(tmp_path / "straight-log") as address:
        straight = LearnerRun(tmp_path / "straight", address, moe=moe)
        assert await straight.train()
    async with serving(tmp_path / "restarted-log") as address:
        restarted = LearnerRun(tmp_path / "restarted", address, moe=moe)
        if "until" in interruption:
            assert not await restarted.train(until=interruption["until"])
        else:
            with pytest.raises(CrashError):
                await restarted.train(crash_at=interruption["crash_at"])
        assert await restarted.train()
        assert await restarted.recompute(STEPS) is None
    assert story(straight) == story(restarted)
    expected, found = tensors(straight), tensors(restarted)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    journals = [read_journal(run.directory / "metrics.jsonl") for run in (straight, restarted)]
    assert [record["step"] for record in journals[0]] == [record["step"] for record in journals[1]] == [1, 2, 3, 4]


async def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """The checkpoint of step 2 is durable only after step 3; it holds step 2, and no step is lost from the ledger."""
    async with serving(tmp_path / "log") as address:
        run = LearnerRun(tmp_path / "run", address)
        assert await run.train(slow_save=True)
        assert run.store.load(2).version.step == 2
        groups = {step: receipt.groups for step, receipt in read_receipts(run.directory).steps.items()}
        ledger = {step: tuple(group.group_id for group in groups[step]) for step in groups}
        assert dict(run.store.load(2).ledger) == {1: ledger[1], 2: ledger[2]}
        assert dict(run.store.load(4).ledger) == {3: ledger[3], 4: ledger[4]}
        assert await run.recompute(3) is None  # from the checkpoint of step 2


async def test_the_buffer_is_told_which_checkpoint_is_the_oldest(tmp_path: Path) -> None:
    """What later steps trained on may be asked for again, so the log keeps it."""
    async with serving_buffer(tmp_path / "log") as (address, buffer):
        run = LearnerRun(tmp_path / "run", address)
        assert await run.train()
        kept = CheckpointStore(run.directory / "checkpoints", keep=100).steps()
        (state,) = buffer._store._states()
        assert state.oldest_kept_step == kept[0] < kept[-1] == state.committed_step
