"""Any one process dies by SIGKILL, three times, at different moments: the run finishes, and every invariant holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.rehearsal import STEPS, KillPoint, rehearse
from tests.harness.oracle import violations

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.mark.parametrize(
    ("victim", "points"),
    [
        (
            "replay-buffer",
            [KillPoint(8, "write.answered"), KillPoint(18, "DrawBatch.ended"), KillPoint(30, "Commit.begun")],
        ),
        ("learner", [KillPoint(13, "line"), KillPoint(19, "Commit.ended"), KillPoint(33, "Advance.ended")]),
        (
            "server-0",
            [KillPoint(8, "write.answered"), KillPoint(18, "AcquireTickets.ended"), KillPoint(30, "write.sent")],
        ),
    ],
    ids=["replay-buffer", "learner", "server"],
)
async def test_a_run_survives_kills(tmp_path: Path, victim: str, points: list[KillPoint]) -> None:
    outcome, plan, events, evidence = await rehearse(tmp_path, victim, points)
    assert outcome.error == ""
    assert plan.kills == len(points)
    assert sum("was killed by SIGKILL" in event for event in events) == len(points)
    assert violations(evidence) == []
    if victim == "server-0":
        assert any(write.item.attempt > 1 and write.acknowledged for write in evidence.record.writes)
    summary = json.loads((evidence.run_directory / "summary.json").read_text())
    assert summary["finished"]
    assert summary["steps"] == STEPS
    assert summary["learner_epochs"] == (1 + len(points) if victim == "learner" else 1)
