"""A server that never finishes a rollout holds up the run: it is found by its open rollouts, drained and named.

Nothing here depends on the speed of the machine: the slow server takes a minute for a token, steps that need its groups
are not drawn, and its open rollouts grow older until their age is far beyond what the other servers take.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from leeway.cli.main import main
from leeway.cli.serve import serve_command
from leeway.types import GroupState, Purpose
from tests.deadlines import RUN_SECONDS, WAIT_SECONDS
from tests.e2e.rehearsal import Visitors, rehearse
from tests.harness.oracle import violations

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(RUN_SECONDS)]

STEPS = 24
OVERRIDES = (
    f"run.steps={STEPS}",
    # More groups a step than the other two take on at once: some are left for the slow one.
    "run.groups_per_step=6",
    "replay_buffer.lease_seconds=3",
    "learner.fleet.slow_ratio=10",
    "learner.fleet.min_groups=2",
    "learner.fleet.slow_seconds=4",
    "learner.fleet.check_seconds=0.5",
    f"learner.draw_timeout_seconds={2 * WAIT_SECONDS}",
)


async def test_a_slow_server_is_drained_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(tmp_path / "rehearsal" / "config.toml")
    slow = "--set=inference_server.arithmetic.token_seconds=60"
    visitors = Visitors(
        tmp_path, {"slow": serve_command("inference-server", "--join", "slow", "--config", config, slow)}, after_step=1
    )
    try:
        outcome, _, _, evidence = await rehearse(
            tmp_path, "nobody", [], OVERRIDES, [visitors.on_event], network=visitors
        )
    finally:
        codes = await visitors.ended()
    assert (outcome.error, codes) == ("", {"slow": 0})
    assert violations(evidence) == []

    # It held groups, and others took them over.
    record = evidence.record
    held = {
        ticket.group_id
        for call in record.of("AcquireTickets")
        if call.request.server_id == "slow" and call.succeeded
        for ticket in call.reply.tickets
    }
    assert held
    trained = {
        group.group_id: {trajectory.server_id for trajectory in group.trajectories}
        for group in evidence.groups
        if group.state is GroupState.CONSUMED and group.purpose is Purpose.TRAIN
    }
    assert any(group_id in trained and "slow" not in trained[group_id] for group_id in held)

    # It is named: in the summary, to itself, and by the command.
    summary = json.loads((evidence.run_directory / "summary.json").read_text())
    assert (summary["finished"], summary["steps"]) == (True, STEPS)
    (drained,) = [entry for entry in summary["drained_servers"] if entry["server"] == "slow"]
    assert drained["reason"] == "slow"
    assert "those of the others" in drained["message"]
    (drain,) = [call for call in record.of("DrainServer") if call.request.server_id == "slow"]
    assert drain.succeeded
    after = [call for call in record.of("AcquireTickets") if call.begun > (drain.ended or 0)]
    assert not any(call.request.server_id == "slow" and call.reply.tickets for call in after if call.succeeded)
    assert "server slow is drained (slow)" in (tmp_path / "slow.log").read_text()
    assert await asyncio.to_thread(main, ["fleet", "ls", str(evidence.run_directory)]) == 0
    assert "drained (slow)" in capsys.readouterr().out
