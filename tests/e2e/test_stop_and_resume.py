"""`leeway run` as a process: Ctrl-C leaves a checkpoint, SIGKILL leaves no orphans, --resume continues the curve."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from learner.run_artifacts.journal import read_journal
from tests.deadlines import WAIT_SECONDS
from tests.e2e.rehearsal import EXAMPLE, SMALL
from tests.harness.processes import CLI, children_of, command_line, overriding, running

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

STEPS = 30
SLOW = ("--set", "inference_server.arithmetic.token_seconds=0.05")
"""A step takes a second: the run is far from its end when the test does something to it."""
FAST = ("--set", "inference_server.arithmetic.token_seconds=0.004")


def arguments(directory: Path) -> list[str]:
    overrides = [*SMALL, f"run.steps={STEPS}", f"run.directory={directory}"]
    return ["run", str(EXAMPLE), *overriding(overrides)]


def leeway(arguments: Sequence[str]) -> AbstractAsyncContextManager[asyncio.subprocess.Process]:
    return running(CLI, *arguments, "--plain")


async def training_begins(process: asyncio.subprocess.Process) -> None:
    assert process.stderr is not None
    while line := (await process.stderr.readline()).decode():
        if line.startswith("step 1/"):
            return
    raise AssertionError("the run ended before its first step")


async def resume(arguments: Sequence[str], run_directory: Path) -> None:
    """Finish an interrupted run, and look at what it left behind."""
    async with leeway([*arguments, *FAST]) as process:
        _, stderr = await process.communicate()
    assert process.returncode == 0, stderr.decode()
    records = read_journal(run_directory / "metrics.jsonl")
    assert [record["step"] for record in records if record["kind"] == "step"] == list(range(1, STEPS + 1))
    elapsed = [record["elapsed_seconds"] for record in records if record["kind"] == "step"]
    assert elapsed == sorted(elapsed)
    summary = json.loads((run_directory / "summary.json").read_text())
    assert (summary["finished"], summary["steps"], summary["learner_epochs"]) == (True, STEPS, 2)
    assert summary["groups_issued"] == summary["groups_consumed"] + sum(summary["dropped_groups"].values())
    assert summary["groups_consumed"] == 4 * STEPS


async def test_a_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    patient = "--set", f"learner.stop_seconds={2 * WAIT_SECONDS}", "--set", f"learner.checkpoint_every_steps={STEPS}"
    async with leeway([*arguments(tmp_path), *SLOW, *patient]) as process:
        await training_begins(process)
        (learner,) = [child for child in children_of(process.pid) if "learner" in command_line(child)]
        os.kill(learner, signal.SIGSTOP)  # it will never write its checkpoint
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        while not (await process.stderr.readline()).startswith(b"stopping"):
            pass
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(WAIT_SECONDS):
            stdout, _ = await process.communicate()
    with pytest.raises(ProcessLookupError):
        os.kill(learner, 0)
    assert "leeway: stopped at step" in stdout.decode()
    assert "; its newest checkpoint is of step 0; continue with: " in stdout.decode()
    await resume([*arguments(tmp_path), "--resume"], tmp_path / "rehearsal")


async def test_ctrl_c_stops_with_a_checkpoint_and_says_how_to_resume(tmp_path: Path) -> None:
    run_directory = tmp_path / "rehearsal"
    async with leeway([*arguments(tmp_path), *SLOW]) as process:
        await training_begins(process)
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(WAIT_SECONDS):
            stdout, stderr = await process.communicate()
    assert process.returncode == 0, stderr.decode()
    (line,) = [line for line in stdout.decode().splitlines() if line.startswith("leeway: stopped")]
    said, _, command = line.partition("; continue with: ")
    steps = len([record for record in read_journal(run_directory / "metrics.jsonl") if record["kind"] == "step"])
    assert said == f"leeway: stopped at step {steps} with a checkpoint"
    assert 1 <= steps < STEPS
    assert (run_directory / "checkpoints" / f"step-{steps:08d}" / "manifest.json").exists()
    assert not json.loads((run_directory / "summary.json").read_text())["finished"]
    program, *again = shlex.split(command)
    assert program == "leeway"
    await resume(again, run_directory)


async def test_a_killed_supervisor_leaves_nothing_running_and_the_run_resumes(tmp_path: Path) -> None:
    async with leeway([*arguments(tmp_path), *SLOW]) as process:
        await training_begins(process)
        descriptors = [os.pidfd_open(child) for child in children_of(process.pid)]
        assert len(descriptors) == 4
        process.kill()
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                await asyncio.gather(*(_ended(descriptor) for descriptor in descriptors))
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
    await resume([*arguments(tmp_path), "--resume"], tmp_path / "rehearsal")


async def _ended(descriptor: int) -> None:
    """Wait for the process behind a pidfd."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(descriptor, ended.set)
    await ended.wait()
    loop.remove_reader(descriptor)
