"""Invariant 8: when a commit is asked for, its checkpoint would load if the power went at that moment."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from tests.harness.disks import DurableView


def missing_checkpoint(run_directory: Path, ledger: Path, step: int) -> Iterator[str]:
    """What keeps the checkpoint of a step from being loaded after a loss of power."""
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
