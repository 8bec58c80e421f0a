"""What judges a chaos run beside the oracle: a buffer that does not start, retention, durable checkpoints.

The oracle's invariants are in tests/harness/oracle.py; tests/chaos/invariants.md lists where each is held.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from leeway.types import DropReason, GroupRecord, GroupState, Purpose
from tests.harness.disks import DurableView
from tests.harness.oracle import LEGAL_DROPS, Oracle, RecordedCalls, content_of
from tests.harness.recording_proxy import Record


class ChaosOracle(Oracle):
    """A person returns the run to a checkpoint now and then, which drops training groups, too."""

    legal_drops = {  # noqa: RUF012 (nobody changes it)
        Purpose.TRAIN: LEGAL_DROPS[Purpose.TRAIN] | {DropReason.ROLLED_BACK},
        Purpose.EVAL: LEGAL_DROPS[Purpose.EVAL],
    }


def violations_without_export(record: Record) -> list[str]:
    """For a buffer that does not start, or that does not know the run."""
    calls = RecordedCalls(record)
    acknowledged = sum(write.acknowledged for write in record.writes)
    lost = [f"1: {acknowledged} writes were acknowledged, and none of them can be read"] if acknowledged else []
    checks = {1: calls.forgotten, 6: calls.in_order, 7: calls.fenced}
    return lost + [f"{number}: {line}" for number, check in checks.items() for line in check()]


def wrongly_retired(record: Record, groups: Sequence[GroupRecord], kept: Sequence[GroupRecord]) -> Iterator[str]:
    """Differences between what a buffer with retention exports and what its whole log says."""
    exported = {group.group_id: group for group in kept}
    oldest_kept_step = max((call.request.oldest_kept_step for call in record.of("Commit")), default=0)
    for group in groups:
        there = exported.pop(group.group_id, None)
        if there is not None:
            if (there.state, content_of(there.trajectories)) != (group.state, content_of(group.trajectories)):
                yield f"group {group.group_id} is exported otherwise than its log says"
        elif group.state not in (GroupState.CONSUMED, GroupState.DROPPED):
            yield f"group {group.group_id} is retired, though it is {group.state.name}"
        elif group.state is GroupState.CONSUMED and group.purpose is Purpose.TRAIN and group.step > oldest_kept_step:
            kept_step = f"a checkpoint of step {oldest_kept_step} is kept"
            yield f"group {group.group_id} of step {group.step} is retired, but {kept_step}"
    for group_id in exported:
        yield f"group {group_id} is exported, and its log does not know it"


def missing_checkpoint(run_directory: Path, ledger: Path, step: int) -> Iterator[str]:
    """Why the checkpoint of a step could not be loaded if the power went at this moment."""
    view = DurableView(run_directory, ledger)
    directory = run_directory / "checkpoints" / f"step-{step:08d}"
    manifest_path = directory / "manifest.json"
    if problem := view.problem(manifest_path):
        yield f"Commit of step {step}: {problem}"
        return
    manifest = json.loads(manifest_path.read_text())
    if manifest["step"] != step:
        yield f"Commit of step {step}: {manifest_path} is that of step {manifest['step']}"
    for name, digest in manifest["files"].items():
        path = directory / name
        if problem := view.problem(path):
            yield f"Commit of step {step}: {problem}"
        elif hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            yield f"Commit of step {step}: {path} is not what the manifest says"
