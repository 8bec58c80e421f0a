"""What must outlive a loss of power does; and the disk of the chaos suite forgets everything else."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from learner.run_artifacts.checkpoint import CheckpointStore
from learner.run_artifacts.journal import Journal, read_journal
from leeway.service.durable import replace_file, sync_directory
from leeway.types import PolicyVersion
from replay_buffer.storage.log import Log, LogOptions
from tests.harness.disks import DurableView, Witness, power_loss


class Disk:
    """A directory whose syncs are witnessed."""

    def __init__(self, directory: Path) -> None:
        self.root, self.home = directory / "disk", directory / "ledger"
        self.root.mkdir()
        self.witness = Witness(self.root, self.home)
        self.witness.install()

    def problem(self, path: Path) -> str:
        return DurableView(self.root, self.home).problem(path)

    def lose_power(self, seed: int = 0) -> None:
        power_loss(self.root, self.home, Random(seed))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    before = os.fsync, os.fdatasync
    disk = Disk(tmp_path)
    try:
        yield disk
    finally:
        os.fsync, os.fdatasync = before
        disk.witness.close()


def version(step: int) -> PolicyVersion:
    return PolicyVersion("r", 1, step, bytes(32))


def save(store: CheckpointStore, step: int) -> Path:
    def write(directory: Path) -> None:
        (directory / "weights").write_bytes(b"w" * 9)

    directory = store.save(version(step), [], [], write).directory
    store.remove_old()
    return directory


def test_a_checkpoint_is_durable_with_every_name_on_its_way(disk: Disk) -> None:
    directory = save(CheckpointStore(disk.root / "run" / "checkpoints", keep=2), 3)
    assert disk.problem(directory / "manifest.json") == ""
    assert disk.problem(directory / "weights") == ""


@pytest.mark.parametrize("seed", range(8))
def test_whatever_is_lost_with_a_checkpoint_that_was_being_replaced_a_whole_one_is_left(disk: Disk, seed: int) -> None:
    store = CheckpointStore(disk.root / "checkpoints", keep=1)
    for step in (1, 2, 3):
        save(store, step)
    pending = store.begin(version(4), [], [])
    (pending.partial / "weights").write_bytes(b"half")
    disk.lose_power(seed)
    restored = store.newest()
    assert restored is not None
    assert restored.version == version(3)
    save(store, 4)
    assert store.steps() == [4]


def test_an_abandoned_checkpoint_does_not_come_back(disk: Disk) -> None:
    store = CheckpointStore(disk.root / "checkpoints", keep=2)
    for step in (2, 4, 6):
        save(store, step)
    for step in (3, 5):  # as after a return to step 2
        save(store, step)
    for seed in range(8):
        disk.lose_power(seed)
    assert store.steps() == [3, 5]


def test_a_journal_keeps_what_was_synced_when_it_is_opened_again(disk: Disk) -> None:
    path = disk.root / "run" / "metrics.jsonl"
    path.parent.mkdir()
    sync_directory(disk.root)
    journal = Journal(path, resume_step=0)
    journal.append({"kind": "step", "step": 1})
    journal.sync()
    journal.close()
    Journal(path, resume_step=1).close()
    assert disk.problem(path) == ""


@pytest.mark.parametrize("tail", [b'{"kind": "st', b"\0\0\0\n", b"\xff\xfe\x9c\n", b"{]\n"])
def test_a_journal_ends_where_it_is_torn(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(json.dumps({"kind": "step", "step": 1}).encode() + b"\n" + tail)
    assert [record["step"] for record in read_journal(path)] == [1]


def test_a_replaced_file_is_the_old_one_or_the_new_one(disk: Disk) -> None:
    path = disk.root / "summary.json"
    replace_file(path, "old")
    replace_file(path, "new")
    assert disk.problem(path) == ""
    disk.lose_power()
    assert path.read_text() == "new"


async def test_the_log_is_durable_with_every_name_on_its_way(disk: Disk) -> None:
    log = Log(LogOptions(disk.root / "deep" / "replay"))
    log.start()
    log.append(b"record")
    await log.durable()
    assert disk.problem(disk.root / "deep" / "replay" / "segment-00000001.log") == ""
    await log.aclose()


def test_the_disk_forgets_bytes_names_renames_and_removals(disk: Disk) -> None:
    kept, new, gone = disk.root / "kept", disk.root / "new", disk.root / "gone"
    for path in (kept, gone):
        replace_file(path, "synced")
    outcomes: set[tuple[object, ...]] = set()
    for seed in range(64):
        with kept.open("a") as file:
            file.write("unsynced")
        new.write_text("never synced")
        gone.unlink()
        disk.lose_power(seed)
        outcomes.add((len(kept.read_text(errors="replace")) > len("synced"), new.exists(), gone.exists()))
        assert kept.read_bytes().startswith(b"synced")
        for path in (new, kept, gone):
            path.unlink(missing_ok=True)
        for path in (kept, gone):
            replace_file(path, "synced")
    assert len(outcomes) == 8
