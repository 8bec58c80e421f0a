"""Receipts of a real run: every step can be computed again, and whatever was changed is named."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from learner.run_artifacts.receipts import FILE, ReceiptBook, read_receipts
from learner.trainer import StepResult, Trainer
from leeway.errors import CorruptDataError, NotFoundError, PreconditionError
from leeway.types import GroupState
from replay_buffer.storage.segments import segment_path
from tests.contract.learner_run import RUN, STEPS, LearnerRun, learner_options, tags_of, with_flipped_byte
from tests.harness.buffer_server import connected, serving


@pytest.fixture(params=[False, True], ids=["dense", "moe"])
async def run(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[LearnerRun]:
    async with serving(tmp_path / "log") as address:
        run = LearnerRun(tmp_path / "run", address, moe=request.param)
        assert await run.train()
        yield run


@pytest.fixture
async def dense(tmp_path: Path) -> AsyncIterator[LearnerRun]:
    async with serving(tmp_path / "log") as address:
        run = LearnerRun(tmp_path / "run", address)
        assert await run.train()
        yield run


async def test_every_step_is_computed_again_to_the_bit(run: LearnerRun) -> None:
    for step in range(1, STEPS + 1):
        assert await run.recompute(step) is None


async def test_a_receipt_says_what_a_step_was_made_of(dense: LearnerRun) -> None:
    receipts = read_receipts(dense.directory)
    assert sorted(receipts.steps) == [1, 2, 3, 4]
    for step in range(2, STEPS + 1):
        assert receipts.steps[step].parent == receipts.steps[step - 1].version
    first = receipts.steps[1]
    assert len(first.groups) == 2
    assert first.versions == (first.parent,)  # all was sampled from the first weights
    seeds = [t.seed for group in first.groups for t in group.trajectories]
    assert len(set(seeds)) == 6
    assert None not in seeds
    assert receipts.options[first.options]["learner.training.learning_rate"] == "0.001"
    assert first.statistics["num_sequences"] == 6


async def test_a_changed_byte_is_named(dense: LearnerRun) -> None:
    victim = read_receipts(dense.directory).steps[3].groups[1].trajectories[2].trajectory_id
    difference = await dense.recompute(4, change=lambda record: with_flipped_byte(record, victim))
    assert difference is not None
    assert (difference.step, difference.kind, difference.name) == (3, "trajectory", victim)


async def test_a_byte_changed_on_disk_is_named(tmp_path: Path) -> None:
    async with serving(tmp_path / "log") as address:
        run = LearnerRun(tmp_path / "run", address)
        assert await run.train()
        path = segment_path(tmp_path / "log", 1)
        data = bytearray(path.read_bytes())
        victim = read_receipts(run.directory).steps[4].groups[0].trajectories[0].trajectory_id
        data[data.index(victim.encode(), data.index(b"fake/1")) + len(victim) + 60] ^= 1
        path.write_bytes(data)
        with pytest.raises(CorruptDataError, match="segment"):
            await run.recompute(4)


async def test_another_option_is_named(dense: LearnerRun) -> None:
    difference = await dense.recompute(1, options=learner_options(learning_rate=2e-3))
    assert str(difference) == "step 1: option learner.training.learning_rate was 0.001, but is 0.002"


async def test_another_processor_is_named(dense: LearnerRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal bits are promised on the same kind of machine: products round differently on another."""
    recorded = json.loads(
        read_receipts(dense.directory).options[read_receipts(dense.directory).steps[1].options]["device"]
    )
    assert recorded == f"cpu {torch.backends.cpu.get_cpu_capability()}"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ANOTHER")
    difference = await dense.recompute(1)
    assert str(difference) == f'step 1: option device was "{recorded}", but is "cpu ANOTHER"'


async def test_missing_and_exchanged_groups_are_named(dense: LearnerRun) -> None:
    groups = read_receipts(dense.directory).steps[1].groups
    second = groups[1].group_id
    difference = await dense.recompute(
        1, change=lambda r: replace(r, group_id="elsewhere") if r.group_id == second else r
    )
    assert difference is not None
    assert (difference.kind, difference.name) == ("group", second)


class _Disturbed:
    """A trainer that reports another statistic, or comes to other weights, than it should."""

    def __init__(self, trainer: Trainer, *, statistic: bool) -> None:
        self._trainer = trainer
        self._statistic = statistic

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)

    def train_step(self, step: int, groups: Any, branches: Any) -> StepResult:
        result = self._trainer.train_step(step, groups, branches)
        if self._statistic:
            loss = result.statistics["loss"]
            return replace(result, statistics={**result.statistics, "loss": loss + 1e-15})
        weights: Any = self._trainer
        weights._policy.model.model.norm.weight.data[3] += 1e-6
        return result


def _disturbed(trainer: Trainer, *, statistic: bool) -> Trainer:
    return cast("Trainer", _Disturbed(trainer, statistic=statistic))


async def test_another_statistic_is_named(dense: LearnerRun) -> None:
    difference = await dense.recompute(1, trainer=_disturbed(dense.trainer(), statistic=True))
    assert difference is not None
    assert (difference.kind, difference.name) == ("statistic", "loss")


async def test_another_tensor_is_named(dense: LearnerRun) -> None:
    difference = await dense.recompute(1, trainer=_disturbed(dense.trainer(), statistic=False))
    assert difference is not None
    assert (difference.kind, difference.name) == ("tensor", "model.norm.weight")


async def test_without_a_checkpoint_it_says_what_to_raise(dense: LearnerRun) -> None:
    with pytest.raises(NotFoundError, match="no receipt of step 9; there are: steps 1 to 4"):
        await dense.recompute(9)
    for step in dense.store.steps()[:-1]:
        for path in sorted((dense.directory / "checkpoints" / f"step-{step:08d}").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    with pytest.raises(NotFoundError, match=r"keep_checkpoints"):
        await dense.recompute(2)


async def test_a_checkpoint_of_another_history_is_refused(dense: LearnerRun) -> None:
    manifest = dense.directory / "checkpoints" / "step-00000002" / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "epoch": 9}))
    with pytest.raises(PreconditionError, match="belong to another history"):
        await dense.recompute(3)


async def test_receipts_of_an_abandoned_branch_are_dropped(dense: LearnerRun) -> None:
    ReceiptBook(dense.directory, dense.deciding(), resume_step=2).close()
    assert sorted(read_receipts(dense.directory).steps) == [1, 2]


async def test_a_damaged_file_of_receipts_is_refused(dense: LearnerRun) -> None:
    path = dense.directory / FILE
    path.write_text(path.read_text().replace('"parent"', '"parents"', 1))
    with pytest.raises(CorruptDataError, match="not a receipt"):
        read_receipts(dense.directory)


async def test_each_step_says_the_mean_reward_of_every_task_tag(dense: LearnerRun) -> None:
    async with connected(dense.address, RUN) as client:
        exported = [group async for group in client.export_groups(state=GroupState.CONSUMED)]
    expected: dict[int, dict[str, list[float]]] = {}
    for group in exported:
        for tag in tags_of(group.task_index):
            rewards = expected.setdefault(group.step, {}).setdefault(tag, [])
            rewards += [member.close.reward for member in group.trajectories if member.close is not None]
    means = {step: {tag: sum(r) / len(r) for tag, r in by_tag.items()} for step, by_tag in expected.items()}
    records = [json.loads(line) for line in (dense.directory / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert {record["step"]: record["reward_by_tag"] for record in records if record["kind"] == "step"} == means
    assert {"even", "odd", "first"} == {tag for by_tag in means.values() for tag in by_tag}
    for tag in ("even", "odd", "first"):
        newest = max(step for step, by_tag in means.items() if tag in by_tag)
        assert dense.registry.get_sample_value("leeway_learner_tag_reward", {"tag": tag}) == means[newest][tag]
