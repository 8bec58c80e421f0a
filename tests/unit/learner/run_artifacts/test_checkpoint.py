from pathlib import Path

import pytest

from learner.run_artifacts.checkpoint import CheckpointStore
from learner.run_artifacts.journal import Journal, read_journal
from leeway.errors import CorruptDataError, NotFoundError
from leeway.types import PolicyVersion, Rollback


def version(step: int, epoch: int = 1) -> PolicyVersion:
    return PolicyVersion("demo", epoch, step, bytes([step]) * 32)


def write(content: str):  # noqa: ANN201
    def write_into(directory: Path) -> None:
        (directory / "weights").mkdir()
        (directory / "weights" / "model").write_text(content, encoding="utf-8")

    return write_into


def test_a_checkpoint_comes_back_with_its_ledger(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "c", keep=2)
    saved = store.save(version(5), [(4, ("g1", "g2")), (5, ("g3",))], [(1, 0)], write("five"))
    assert store.newest() == saved
    assert saved.ledger == ((4, ("g1", "g2")), (5, ("g3",)))
    assert (saved.directory / "weights" / "model").read_text(encoding="utf-8") == "five"


def test_a_crash_while_writing_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "c", keep=2)
    first = store.save(version(5), [], [], write("five"))

    def crash(directory: Path) -> None:
        write("half")(directory)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        store.save(version(10), [], [], crash)
    assert CheckpointStore(tmp_path / "c", keep=2).newest() == first
    assert store.save(version(10), [], [], write("ten")) == store.newest()


def test_changed_files_are_refused_by_name(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "c", keep=2)
    saved = store.save(version(5), [], [], write("five"))
    (saved.directory / "weights" / "model").write_text("fivE", encoding="utf-8")
    with pytest.raises(CorruptDataError, match="model: missing or changed"):
        store.newest()


def test_only_the_newest_are_kept_once_the_newest_is_committed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "c", keep=2)
    for step in (0, 5, 10, 15):
        store.save(version(step), [], [], write(str(step)))
    # Until then the buffer may still return the run to any of them.
    assert store.steps() == [0, 5, 10, 15]
    assert store.oldest_kept_step() == 10
    store.remove_old()
    assert store.steps() == [10, 15]
    with pytest.raises(NotFoundError, match="no checkpoint of step 5; there are: 10, 15"):
        store.load(5)


def test_the_journal_keeps_the_surviving_history_only(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    heard: list[str] = []
    journal = Journal(path, resume_step=0, listen=heard.append)
    for step in (1, 2, 3):
        journal.append({"kind": "step", "step": step})
    journal.close()
    with path.open("a", encoding="utf-8") as file:
        file.write('{"kind": "step", "st')  # a crash in the middle of a line
    assert [record["step"] for record in read_journal(path)] == [1, 2, 3]
    resumed = Journal(path, resume_step=2)
    resumed.append({"kind": "step", "step": 3, "again": True})
    resumed.close()
    assert [record.get("again") for record in read_journal(path)] == [None, None, True]
    assert len(heard) == 3


def test_a_rollback_discards_its_branch_and_nothing_else(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "c", keep=9)
    for step in (0, 5, 10, 15):
        store.save(version(step), [], [], write(str(step)))
    rollback = Rollback(version(5), epoch=2)
    assert store.discard_abandoned(rollback) == [10, 15]
    assert store.discard_abandoned(rollback) == []
    store.save(version(10, epoch=3), [], [], write("again"))
    assert store.discard_abandoned(rollback) == []  # what came after the rollback stays, however late one asks
    assert store.steps() == [0, 5, 10]
