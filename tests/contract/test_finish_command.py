"""A run that a person gives up: with `leeway buffer finish`, and under a learner that is at work."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pytest

from learner.run_artifacts.run_lock import held_run
from learner.trainer import Trainer
from leeway.cli.main import main
from leeway.errors import PreconditionError
from leeway.types import DropReason, WriteItem, WriteStatus
from tests.contract.learner_run import RUN as LEARNER_RUN
from tests.contract.learner_run import LearnerRun
from tests.deadlines import WAIT_SECONDS
from tests.harness.buffer_server import connected, serving, serving_buffer, write
from tests.harness.configurations import EXAMPLE, write_rehearsal
from tests.harness.replay_builders import DATASET, ROOT, RUN, SIGNATURE, chunk, filled, spec, version

ENDED = f"run '{RUN}': already finished at step 2 of 100; nothing to do\n"
STEP = {"kind": "step", "step": 1, "elapsed_seconds": 1.0, "batch_wait_seconds": 0.5, "reward_mean": 0.5}


async def leave_a_run(address: str) -> None:
    """Step 1 is committed, step 2 trained; one group is open, one ready, and nobody comes back."""
    async with connected(address) as client:
        await client.open_run(spec(), ROOT, [])
        tickets, *_ = await client.acquire_tickets("s0", ROOT, 12, WAIT_SECONDS)
        *whole, half = tickets
        await write(client, [item for ticket in whole for item in filled(ticket)])
        await write(client, [WriteItem(half.members[0].trajectory_id, 1, 0, chunk())])
        for step, parent in ((1, ROOT), (2, version(1))):
            await client.draw_batch(1, step, WAIT_SECONDS)
            await client.advance(1, version(step), parent)
        await client.commit(1, 1)


@pytest.fixture
async def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / RUN
    folder.mkdir()
    write_rehearsal(folder / "config.toml", f"run.name={RUN}", f"run.directory={tmp_path}")
    async with serving(folder / "replay") as address:
        await leave_a_run(address)
    return folder


Leeway = Callable[..., tuple[int, str]]


@pytest.fixture
def leeway(capsys: pytest.CaptureFixture[str]) -> Leeway:
    def run(*arguments: str) -> tuple[int, str]:
        code = main(arguments)
        output = capsys.readouterr()
        return code, output.out + output.err

    return run


@pytest.mark.processes
def test_a_run_that_nobody_continues_is_ended_for_good(run_folder: Path, leeway: Leeway) -> None:
    intervals = {"staleness_histogram": {"0": 1}, "generation_intervals": [], "training_interval": [0.0, 1.0]}
    (run_folder / "metrics.jsonl").write_text(json.dumps({**STEP, **intervals}) + "\n", encoding="utf-8")
    code, said = leeway("buffer", "finish", str(run_folder))
    assert code == 0, said
    what, done = said.splitlines()
    assert what == (
        f"run '{RUN}' is at step 2 of 100: dropping 1 open, 1 ready and 2 drawn groups (run_end), "
        "including those of step 2, which is trained but not committed"
    )
    assert done.startswith(f"run '{RUN}' is finished: 4 groups are dropped")
    assert "2 consumed and 0 dropped before stay as long as retention keeps them" in done
    assert leeway("buffer", "finish", str(run_folder)) == (0, ENDED)
    code, listed = leeway("buffer", "ls", str(run_folder))
    assert f"run {RUN}: given up at step 2 of 100" in listed
    assert listed.count("dropped (run_end)") == 4
    assert leeway("buffer", "verify", str(run_folder))[0] == 0
    # Nobody is told to resume it.
    assert json.loads((run_folder / "summary.json").read_text(encoding="utf-8"))["finished"]
    for arguments in ((), ("--resume",)):
        named = f"run.name={RUN}", f"run.directory={run_folder.parent}"
        code, said = leeway("run", str(EXAMPLE), "--set", named[0], "--set", named[1], *arguments)
        assert (code, said.count("\n")) == (2, 1)
        assert said.startswith(f"leeway: {run_folder}: this run is finished. To train again, choose another name")


@pytest.mark.processes
def test_a_learner_at_work_is_left_alone_unless_forced(run_folder: Path, leeway: Leeway) -> None:
    with held_run(run_folder):
        code, said = leeway("buffer", "finish", str(run_folder))
        assert (code, said.count("\n")) == (2, 1)
        assert f"process {os.getpid()}, is running in this folder" in said
        assert "give --force" in said
        code, said = leeway("buffer", "finish", str(run_folder), "--force")
        assert code == 0, said
        assert leeway("buffer", "finish", str(run_folder)) == (0, ENDED)
    assert not (run_folder / "summary.json").exists()  # nothing was trained here


@pytest.mark.processes
def test_a_run_that_is_unknown_is_said(tmp_path: Path, leeway: Leeway) -> None:
    code, said = leeway("buffer", "finish", str(tmp_path))
    assert (code, said.count("\n")) == (1, 1)
    assert "holds no run (no config.toml)" in said
    config = write_rehearsal(tmp_path / "cluster.toml", "run.name=never", f"run.directory={tmp_path}")
    code, said = leeway("buffer", "finish", str(config))
    assert (code, said) == (1, "leeway: run 'never' is unknown here: no learner has opened it\n")


async def test_a_run_whose_buffer_serves_ends_for_everyone_who_waits(tmp_path: Path) -> None:
    """Named by its configuration file, on a host without the run's folder; afterwards the buffer is started again."""
    config = tmp_path / "cluster.toml"
    async with serving(tmp_path / "log", lease_seconds=3600.0) as address, connected(address) as client:
        write_rehearsal(config, f"run.name={RUN}", f"run.directory={tmp_path}", f"network.replay_buffer={address}")
        await leave_a_run(address)
        await client.join_run("late", SIGNATURE, DATASET, WAIT_SECONDS)
        drawing = asyncio.create_task(client.draw_batch(1, 3, WAIT_SECONDS))
        (open_group,) = [record async for record in client.export_groups() if record.state.name == "OPEN"]
        assert await asyncio.to_thread(main, ["buffer", "finish", str(config)]) == 0
        assert not (tmp_path / RUN).exists()
        with pytest.raises(PreconditionError, match=r"ended permanently .* at step 2 of 100; .* another name"):
            await drawing
        assert await client.acquire_tickets("late", version(2), 4, WAIT_SECONDS) == ([], True, None)
        trajectory = open_group.trajectories[0]
        (late,) = await write(client, [WriteItem(trajectory.trajectory_id, 1, 1, chunk())])
        assert late.status is WriteStatus.ABORTED
    async with serving(tmp_path / "log") as address, connected(address) as client:
        status = await client.run_status()
        assert (status.finished, status.consumed, status.dropped) == (True, 2, {DropReason.RUN_END: 4})
        with pytest.raises(PreconditionError, match=r"\(`leeway buffer finish`\)"):
            await client.open_run(spec(), version(1), [])
        assert await client.give_up_run() == 0


class _Ending:
    """A trainer that has the run given up in the middle of step 3."""

    def __init__(self, trainer: Trainer, give_up: Callable[[], Awaitable[int]]) -> None:
        self._trainer = trainer
        self._give_up = give_up
        self._loop = asyncio.get_running_loop()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)

    def train_step(self, step: int, groups: Any, branches: Any) -> Any:
        if step == 3:
            asyncio.run_coroutine_threadsafe(cast("Any", self._give_up()), self._loop).result(WAIT_SECONDS)
        return self._trainer.train_step(step, groups, branches)


class _GivenUpRun(LearnerRun):
    def trainer(self) -> Trainer:
        return cast("Trainer", _Ending(super().trainer(), self._give_up))

    async def _give_up(self) -> int:
        async with connected(self.address, LEARNER_RUN) as client:
            return await client.give_up_run()


async def test_a_learner_at_work_ends_with_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its next call is refused, and so is the commit of the checkpoint that is on its way; that one is kept."""
    async with serving_buffer(tmp_path / "log") as (address, buffer):
        run = _GivenUpRun(tmp_path / "run", address)
        with pytest.raises(PreconditionError, match="ended permanently"):
            await run.train(slow_save=True)
        (state,) = buffer._store._states()
        assert (state.given_up, state.committed_step, state.head.step) == (True, 0, 2)
        assert run.store.steps() == [0, 2]
        with pytest.raises(PreconditionError, match="ended permanently"):
            await run.train()
    gc.collect()  # a task whose outcome nobody took says so when it goes
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
