"""The services started one by one, as on a cluster: the commands take their configuration file in place of a folder."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from leeway.config import load_configuration
from tests.e2e.rehearsal import EXAMPLE, SMALL
from tests.harness.processes import leeway, running

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

STEPS = 6


@pytest.fixture
def config(tmp_path: Path) -> Path:
    overrides = [*SMALL, f"run.steps={STEPS}", f"run.directory={tmp_path}/runs", "learner.checkpoint_every_steps=2"]
    path = tmp_path / "cluster.toml"
    load_configuration(EXAMPLE, overrides).with_free_ports().write(path)
    return path


async def test_a_run_of_services_that_were_started_by_hand(config: Path) -> None:
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(running("replay_buffer", "--config", str(config)))
        learner = await stack.enter_async_context(running("learner", "--config", str(config)))
        server = await stack.enter_async_context(running("inference_server", "--config", str(config), "--index", "0"))
        stdout, stderr = (text.decode() for text in await learner.communicate())
        assert (learner.returncode, stdout) == (0, ""), stderr
        for step in range(1, STEPS + 1):
            assert f"step {step}: reward " in stderr
        assert f"step {STEPS}: held-out reward " in stderr
        await server.communicate()
        assert server.returncode == 0
        listed = await asyncio.to_thread(leeway, "fleet", "ls", str(config))
        assert listed.returncode == 0, listed.stderr
        assert "server-0" in listed.stdout
    for arguments, answer in (
        (("rollouts", str(config)), "consumed"),
        (("recompute-step", str(config), "6"), "equal: step 6 gives the same statistics and weights, bit for bit"),
        (("report", str(config)), "report.html"),
        (("buffer", "ls", str(config)), "run rehearsal: finished"),
        (("buffer", "verify", str(config)), "\nOK\n"),
        (("buffer", "dead-letters", str(config)), "no dead letters"),
    ):
        answered = await asyncio.to_thread(leeway, *arguments)
        assert answered.returncode == 0, answered.stderr
        assert answer in answered.stdout + answered.stderr


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    for arguments in (("rollouts",), ("report",), ("fleet", "ls"), ("buffer", "dead-letters")):
        answered = leeway(*arguments, str(tmp_path))
        assert answered.returncode == 1
        assert f"{tmp_path}: " in answered.stderr
        assert "config.toml" in answered.stderr
