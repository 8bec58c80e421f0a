"""Checkpoints: a folder per step that is either whole or not there.

    save   .partial-NNNNNNNN ← trainer's files, manifest.json; fsync all; rename to step-NNNNNNNN; fsync the parent
    load   the newest folder whose manifest and files agree

Only the rename makes a checkpoint exist, so a crash leaves a whole one or a leftover that the next save removes. The
manifest carries the ledger: which groups each step trained on since the last commit that the replay buffer confirmed.
It is what lets the buffer decide, after a crash between checkpoint and commit, that those groups are consumed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from learner.lineage import Branch
from leeway.errors import ConfigError, CorruptDataError, NotFoundError
from leeway.service.durable import make_directory, publish_directory, replace_file, sync_directory, sync_file
from leeway.types import PolicyVersion, Rollback

_MANIFEST: Final = "manifest.json"
_PARTIAL: Final = ".partial-"
_REMOVED: Final = ".removed-"
_PREFIX: Final = "step-"

LedgerStep = tuple[int, tuple[str, ...]]
"""(step, its group ids in order)"""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A durable checkpoint."""

    directory: Path
    version: PolicyVersion
    ledger: tuple[LedgerStep, ...]
    branches: tuple[Branch, ...]


@dataclass(frozen=True, slots=True)
class PendingCheckpoint:
    """A checkpoint whose files are still being written."""

    partial: Path
    version: PolicyVersion
    ledger: tuple[LedgerStep, ...]
    branches: tuple[Branch, ...]


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, directory: Path, *, keep: int) -> None:
        self._directory = directory
        self._keep = keep

    def save(
        self,
        version: PolicyVersion,
        ledger: Sequence[LedgerStep],
        branches: Sequence[Branch],
        write: Callable[[Path], None],
    ) -> Checkpoint:
        """Make a checkpoint durable; `write(folder)` puts the trainer's files there.

        Raises:
            OSError: the disk is full or fails; no checkpoint was made.
        """
        pending = self.begin(version, ledger, branches)
        write(pending.partial)
        return self.finish(pending)

    def begin(
        self, version: PolicyVersion, ledger: Sequence[LedgerStep], branches: Sequence[Branch]
    ) -> PendingCheckpoint:
        """Make the folder for the trainer's files; nothing exists until `finish`."""
        partial = self._directory / f"{_PARTIAL}{version.step:08d}"
        shutil.rmtree(partial, ignore_errors=True)
        make_directory(self._directory)
        partial.mkdir()
        return PendingCheckpoint(partial, version, tuple(ledger), tuple(branches))

    def finish(self, pending: PendingCheckpoint) -> Checkpoint:
        """Make a checkpoint durable whose files are written.

        Raises:
            OSError: the disk is full or fails; no checkpoint was made.
        """
        partial, version = pending.partial, pending.version
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        manifest = {
            "run": version.run,
            "epoch": version.epoch,
            "step": version.step,
            "digest": version.digest.hex(),
            "ledger": [[step, list(group_ids)] for step, group_ids in pending.ledger],
            "branches": [list(branch) for branch in pending.branches],
            "files": {str(path.relative_to(partial)): _file_digest(path) for path in files},
        }
        for path in files:
            sync_file(path)
        for folder in {path.parent for path in files} - {partial}:
            sync_directory(folder)
        replace_file(partial / _MANIFEST, json.dumps(manifest, indent=1))
        final = self._path(version.step)
        # What an abandoned branch left of this step and later ones goes first: it must never be the newest again.
        self._remove([step for step in self.steps() if step >= version.step])
        publish_directory(partial, final)
        return Checkpoint(final, version, pending.ledger, pending.branches)

    def oldest_kept_step(self) -> int:
        """Step of the oldest checkpoint that `remove_old` leaves."""
        return self.steps()[-self._keep :][0]

    def remove_old(self) -> None:
        """Remove all but the newest ones; once the newest is committed, so that nobody can want to go back to them."""
        self._remove(self.steps()[: -self._keep])

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint; None when there is none.

        Raises:
            CorruptDataError: the newest one's files are not what its manifest says.
        """
        steps = self.steps()
        return self.load(steps[-1]) if steps else None

    def load(self, step: int) -> Checkpoint:
        """One checkpoint, its files verified.

        Raises:
            NotFoundError: it is not kept; the message lists those that are.
            CorruptDataError: its files are not what its manifest says.
        """
        if step not in self.steps():
            kept = ", ".join(str(kept) for kept in self.steps()) or "none"
            raise NotFoundError(f"{self._directory}: no checkpoint of step {step}; there are: {kept}")
        directory = self._path(step)
        manifest = _read_manifest(directory / _MANIFEST)
        for name, digest in manifest["files"].items():
            path = directory / name
            if not path.is_file() or _file_digest(path) != digest:
                raise CorruptDataError(
                    f"{path}: missing or changed since it was written; remove {directory} to fall back"
                )
        return Checkpoint(
            directory=directory,
            version=PolicyVersion(
                manifest["run"], manifest["epoch"], manifest["step"], bytes.fromhex(manifest["digest"])
            ),
            ledger=tuple((step, tuple(group_ids)) for step, group_ids in manifest["ledger"]),
            branches=tuple((epoch, step) for epoch, step in manifest["branches"]),
        )

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending."""
        if not self._directory.is_dir():
            return []
        return sorted(
            int(path.name.removeprefix(_PREFIX))
            for path in self._directory.iterdir()
            if path.name.startswith(_PREFIX) and (path / _MANIFEST).is_file()
        )

    def discard_abandoned(self, rollback: Rollback) -> list[int]:
        """Remove what an explicit rollback left behind, so that the newest checkpoint is one to go on from.

        Returns:
            The steps whose checkpoints are gone.
        """
        abandoned = [
            step
            for step in self.steps()
            if step > rollback.version.step and _read_manifest(self._path(step) / _MANIFEST)["epoch"] < rollback.epoch
        ]
        self._remove(abandoned)
        return abandoned

    def _path(self, step: int) -> Path:
        return self._directory / f"{_PREFIX}{step:08d}"

    def _remove(self, steps: Sequence[int]) -> None:
        """Remove checkpoints; each is whole until its name is gone durably."""
        for step in steps:
            removed = self._directory / f"{_REMOVED}{step:08d}"
            shutil.rmtree(removed, ignore_errors=True)
            self._path(step).rename(removed)
            sync_directory(self._directory)
            shutil.rmtree(removed)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the checkpoint's manifest: {error}") from error


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
