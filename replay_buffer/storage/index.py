"""The index: what has ended, by id, outside of memory. A cache of the log, never the truth.

    RunState ── put ──> waiting (memory, at most _WAITING) ── one transaction ──> index.sqlite
    reads            look at what waits first, then into the file; by key or page by page

It is a file of SQLite in write-ahead mode: killed processes and power cuts leave it whole, though perhaps behind. So
`settle` writes down up to which place of the log it is complete, and a snapshot of that place exists only once that is
synced. What the index says beyond the place from which a restart folds is forgotten first; an index that is missing,
behind, damaged or of another log is made anew from the log.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

from google.protobuf.message import DecodeError

from leeway.errors import CorruptDataError, InvalidDataError
from leeway.types import GroupState, Purpose
from leeway.v1 import storage_pb2
from replay_buffer.rules.groups import EvaluationState, Group, Location
from replay_buffer.storage.segments import Position, crc32c
from replay_buffer.storage.stored_state import (
    evaluation_from_proto,
    evaluation_to_proto,
    group_from_proto,
    group_to_proto,
)

FILE: Final = "index.sqlite"
_VERSION: Final = 2
_WAITING: Final = 64
"""Ended groups that are written in one transaction."""
_PAGE: Final = 256
_LARGEST: Final = (1 << 63) - 1
"""SQLite's largest integer; no group has such a number or step."""

_SCHEMA: Final = """
CREATE TABLE complete (generation BLOB, segment INTEGER, offset INTEGER);
CREATE TABLE groups (
    run TEXT, created INTEGER, purpose INTEGER, state INTEGER, step INTEGER, place INTEGER,
    dead_letter INTEGER, oldest_segment INTEGER, ended_segment INTEGER, ended_offset INTEGER,
    checksum INTEGER, body BLOB,
    PRIMARY KEY (run, created)
) WITHOUT ROWID;
CREATE INDEX groups_by_step ON groups (run, step, place) WHERE step > 0;
CREATE INDEX dead_letters ON groups (run, created) WHERE dead_letter = 1;
CREATE INDEX groups_by_segment ON groups (oldest_segment);
CREATE INDEX groups_by_end ON groups (ended_segment, ended_offset);
CREATE TABLE evaluations (
    run TEXT, evaluation_id TEXT, ended_segment INTEGER, ended_offset INTEGER, checksum INTEGER, body BLOB,
    PRIMARY KEY (run, evaluation_id)
) WITHOUT ROWID;
"""


class Filter(NamedTuple):
    """Which groups are asked for; None and 0 stand for all."""

    purpose: Purpose | None = None
    state: GroupState | None = None
    step: int = 0

    def matches(self, group: Group) -> bool:
        """Whether a group is one of them."""
        return (
            (self.purpose is None or group.purpose is self.purpose)
            and (self.state is None or group.state is self.state)
            and (not self.step or group.step == self.step)
        )


class Index:
    """The index of one directory; without a path it lives in memory. Used from one thread, except `sync`."""

    def __init__(self, path: Path | None = None, *, read_only: bool = False) -> None:
        """Open the file, or make it.

        Args:
            path: the file.
            read_only: it exists, and perhaps belongs to a running buffer; what is put stays in memory.

        Raises:
            CorruptDataError: it is not an index that can be used; `remove` it.
        """
        self._path = path
        self._read_only = read_only
        self._groups: dict[tuple[str, int], Group] = {}  # waiting to be written
        self._evaluations: dict[tuple[str, str], tuple[EvaluationState, Location]] = {}
        self._file = _connect(path, read_only=read_only)
        if not read_only:
            self._check()
        self.first_segment = 1
        """The oldest segment that there is; what has a record in an older one is retired."""

    def _check(self) -> None:
        """Refuse a damaged file now: a write that meets the damage later could not be undone."""
        try:
            found: str = self._file.execute("PRAGMA quick_check(1)").fetchone()[0]
        except sqlite3.DatabaseError as error:
            found = str(error)
        if found != "ok":
            self._file.close()
            raise CorruptDataError(_damaged(self._path, " ".join(found.split())))

    @staticmethod
    def remove(path: Path) -> None:
        """Remove an index, in order to make it anew."""
        for name in (path.name, f"{path.name}-wal", f"{path.name}-shm"):
            path.with_name(name).unlink(missing_ok=True)

    def close(self) -> None:
        """Write what waits, as far as possible, and close the file."""
        with suppress(OSError):  # what is not written now is folded again
            self._write()
        self._file.close()

    def of(self, run: str) -> RunIndex:
        """The part of one run."""
        return RunIndex(self, run)

    # Where it stands

    def complete_to(self, generation: bytes) -> Position | None:
        """The place of the log up to which it is complete; None when it belongs to another log."""
        with _reading(self._path):
            row = self._file.execute("SELECT generation, segment, offset FROM complete").fetchone()
        return Position(row[1], row[2]) if row is not None and row[0] == generation else None

    def settle(self, generation: bytes, position: Position) -> None:
        """Write what waits; from now on it is complete up to `position`. Raises OSError when the disk is full."""
        self._write((generation, position))

    def sync(self) -> None:
        """Make everything written durable. Safe beside the other calls, in another thread.

        Raises:
            OSError: it cannot be written.
        """
        if self._path is not None:
            try:
                with closing(_connect(self._path)) as file:
                    file.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            except sqlite3.Error as error:
                raise OSError(f"{self._path}: {error}") from error

    def forget_from(self, position: Position) -> None:
        """Forget what ended at `position` or later: it will be folded again."""
        self._groups.clear()
        self._evaluations.clear()
        with self._file:
            for table in ("groups", "evaluations"):
                self._file.execute(f"DELETE FROM {table} WHERE (ended_segment, ended_offset) >= (?, ?)", position)  # noqa: S608

    def forget_before(self, segment: int) -> None:
        """Forget what has records in older segments: they are retired."""
        self.first_segment = segment
        self._write()
        with self._file:
            self._file.execute("DELETE FROM groups WHERE oldest_segment < ?", (segment,))
            self._file.execute("DELETE FROM evaluations WHERE ended_segment < ?", (segment,))

    def oldest_replayable(self, run: str, after_step: int) -> int | None:
        """The oldest segment that holds something of what the run trained on after a step; None when none does."""
        self._write()
        row = self._file.execute(
            "SELECT min(oldest_segment) FROM groups WHERE run = ? AND state = ? AND purpose = ? AND step > ?",
            (run, int(GroupState.CONSUMED), int(Purpose.TRAIN), min(after_step, _LARGEST)),
        ).fetchone()
        return row[0]

    # Writing

    def put(self, run: str, group: Group) -> None:
        """Take an ended group over."""
        oldest = group.oldest_segment
        if oldest is not None and oldest < self.first_segment:
            return
        self._groups[run, group.created] = group
        if len(self._groups) >= _WAITING:
            with suppress(OSError):  # the disk is full: it waits on in memory
                self._write()

    def put_evaluation(self, run: str, state: EvaluationState, location: Location) -> None:
        """Take an ended evaluation over."""
        self._evaluations[run, state.evaluation.evaluation_id] = (state, location)

    def _write(self, complete: tuple[bytes, Position] | None = None) -> None:
        if self._read_only or not (self._groups or self._evaluations or complete):
            return
        try:
            with self._file:
                self._file.executemany(
                    "INSERT OR REPLACE INTO groups VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    [_row(run, group) for (run, _), group in self._groups.items()],
                )
                self._file.executemany(
                    "INSERT OR REPLACE INTO evaluations VALUES (?, ?, ?, ?, ?, ?)",
                    [_evaluation_row(run, *entry) for (run, _), entry in self._evaluations.items()],
                )
                if complete is not None:
                    self._file.execute("DELETE FROM complete")
                    self._file.execute("INSERT INTO complete VALUES (?, ?, ?)", (complete[0], *complete[1]))
        except sqlite3.Error as error:  # never in the middle of applying a record: what waits stays in memory
            raise OSError(f"{self._path}: {error}") from error
        self._groups.clear()
        self._evaluations.clear()

    # Reading

    def get(self, run: str, created: int) -> Group | None:
        """One group."""
        waiting = self._groups.get((run, created))
        if waiting is not None:
            return waiting
        with _reading(self._path):
            row = self._file.execute(
                "SELECT checksum, body FROM groups WHERE run = ? AND created = ?", (run, min(created, _LARGEST))
            ).fetchone()
        return None if row is None else self._group(row)

    def get_evaluation(self, run: str, evaluation_id: str) -> EvaluationState | None:
        """One evaluation."""
        waiting = self._evaluations.get((run, evaluation_id))
        if waiting is not None:
            return waiting[0]
        with _reading(self._path):
            row = self._file.execute(
                "SELECT checksum, body FROM evaluations WHERE run = ? AND evaluation_id = ?", (run, evaluation_id)
            ).fetchone()
        if row is None:
            return None
        return evaluation_from_proto(storage_pb2.EvaluationSnapshot.FromString(self._checked(row)))

    def batch(self, run: str, step: int) -> tuple[str, ...]:
        """The ids of the groups that a committed step trained on, in order."""
        waiting = [
            group for (owner, _), group in self._groups.items() if (owner, group.step) == (run, step) and group.step
        ]
        with _reading(self._path):
            rows = self._file.execute(
                "SELECT created, checksum, body FROM groups WHERE run = ? AND step = ? AND step > 0 AND state = ?",
                (run, min(step, _LARGEST), int(GroupState.CONSUMED)),
            ).fetchall()
        written = [self._group(row[1:]) for row in rows if (run, row[0]) not in self._groups]
        consumed = [group for group in [*waiting, *written] if group.state is GroupState.CONSUMED]
        return tuple(group.group_id for group in sorted(consumed, key=lambda group: group.place))

    def created(self, run: str, wanted: Filter, *, newest: int = 0) -> Iterator[int]:
        """The numbers of matching groups, ascending, page by page; `newest` keeps only so many."""
        with suppress(OSError):
            self._write()
        extra = sorted(
            number for (owner, number), group in self._groups.items() if owner == run and wanted.matches(group)
        )
        clauses, values = _clauses(run, wanted)
        if newest:
            query = f"SELECT created FROM groups WHERE {clauses} ORDER BY created DESC LIMIT ?"  # noqa: S608
            with _reading(self._path):
                found = [number for (number,) in self._file.execute(query, (*values, newest))]
            yield from sorted({*found, *extra})[-newest:]
            return
        query = f"SELECT created FROM groups WHERE {clauses} AND created > ? ORDER BY created LIMIT {_PAGE}"  # noqa: S608
        after = 0
        while True:
            with _reading(self._path):
                page = [number for (number,) in self._file.execute(query, (*values, after))]
            if not page:
                break
            yield from (number for number in page if number not in extra)
            after = page[-1]
        yield from extra

    def dead_letters(self, run: str, newest: int) -> list[Group]:
        """Dead letters in the order of issue; at most so many, the newest."""
        with suppress(OSError):
            self._write()
        waiting = {number: group for (owner, number), group in self._groups.items() if owner == run}
        with _reading(self._path):
            rows = self._file.execute(
                "SELECT created, checksum, body FROM groups WHERE run = ? AND dead_letter = 1 "
                "ORDER BY created DESC LIMIT ?",
                (run, newest + len(waiting)),
            ).fetchall()
        found = [*waiting.values(), *(self._group(row[1:]) for row in rows if row[0] not in waiting)]
        letters = sorted((group for group in found if group.is_dead_letter), key=lambda group: group.created)
        return letters[-newest:]

    def first_whole_step(self, run: str, groups_per_step: int) -> int | None:
        """The oldest committed step of which no group has been retired."""
        self._write()
        row = self._file.execute(
            "SELECT step FROM groups WHERE run = ? AND state = ? AND step > 0 "
            "GROUP BY step HAVING count(*) >= ? ORDER BY step LIMIT 1",
            (run, int(GroupState.CONSUMED), groups_per_step),
        ).fetchone()
        return None if row is None else row[0]

    def entries(self, before: Position) -> Iterator[tuple[str, str, bytes]]:
        """(run, group or evaluation, entry) of what ended before a place of the log, in a fixed order; for comparison.

        Raises:
            CorruptDataError: an entry fails its checksum.
        """
        self._write()
        for name, key in (("groups", "created"), ("evaluations", "evaluation_id")):
            query = (
                f"SELECT run, {key}, checksum, body FROM {name} "  # noqa: S608 (fixed names)
                f"WHERE (ended_segment, ended_offset) < (?, ?) ORDER BY run, {key}"
            )
            with _reading(self._path):
                for run, number, checksum, body in self._file.execute(query, before):
                    yield run, f"{name} {number}", self._checked((checksum, body))

    def _group(self, row: tuple[int, bytes]) -> Group:
        try:
            return group_from_proto(storage_pb2.GroupSnapshot.FromString(self._checked(row)))
        except (DecodeError, InvalidDataError) as error:
            raise CorruptDataError(_damaged(self._path, str(error))) from error

    def _checked(self, row: tuple[int, bytes]) -> bytes:
        checksum, body = row
        if crc32c(body) != checksum:
            raise CorruptDataError(_damaged(self._path, "an entry fails its checksum"))
        return body


class RunIndex:
    """What has ended in one run: `Ended` of its state."""

    def __init__(self, index: Index, run: str) -> None:
        self._index = index
        self._run = run
        self._prefix = f"{run}-g"

    def get(self, group_id: str) -> Group | None:
        number = group_id.removeprefix(self._prefix)
        if number == group_id or not number.isdecimal():
            return None
        group = self._index.get(self._run, int(number))
        return group if group is not None and group.group_id == group_id else None

    def put(self, group: Group) -> None:
        self._index.put(self._run, group)

    def batch(self, step: int) -> tuple[str, ...]:
        return self._index.batch(self._run, step)

    def evaluation(self, evaluation_id: str) -> EvaluationState | None:
        return self._index.get_evaluation(self._run, evaluation_id)

    def put_evaluation(self, evaluation: EvaluationState, location: Location) -> None:
        self._index.put_evaluation(self._run, evaluation, location)

    def group_id(self, created: int) -> str:
        """The id of a group by its number."""
        return f"{self._prefix}{created}"

    def created(self, wanted: Filter, *, newest: int = 0) -> Iterator[int]:
        """The numbers of matching groups, ascending; `newest` keeps only so many."""
        return self._index.created(self._run, wanted, newest=newest)

    def first_whole_step(self, groups_per_step: int) -> int | None:
        """The oldest committed step of which no group has been retired."""
        return self._index.first_whole_step(self._run, groups_per_step)

    def dead_letters(self, newest: int) -> list[Group]:
        return self._index.dead_letters(self._run, newest)

    def groups(self) -> Iterator[Group]:
        for number in self._index.created(self._run, Filter()):
            group = self._index.get(self._run, number)
            if group is not None:
                yield group


def _connect(path: Path | None, *, read_only: bool = False) -> sqlite3.Connection:
    try:
        if path is not None and read_only:
            # Without a write-ahead log beside it nobody writes it, and reading it must not make one.
            how = "mode=ro" if path.with_name(f"{path.name}-wal").exists() else "immutable=1"
            file = sqlite3.connect(f"{path.absolute().as_uri()}?{how}", uri=True, check_same_thread=False)
        else:
            file = sqlite3.connect(path or ":memory:", check_same_thread=False)
    except sqlite3.Error as error:
        raise CorruptDataError(_damaged(path, str(error))) from error
    try:
        if file.execute("PRAGMA user_version").fetchone()[0] != _VERSION:
            if read_only or file.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
                raise CorruptDataError(_damaged(path, "it has another version"))
            file.executescript(f"PRAGMA journal_mode=WAL; {_SCHEMA} PRAGMA user_version={_VERSION};")
        # Whole after a power cut, though perhaps behind. Only `sync` waits for the disk.
        if not read_only:
            file.executescript("PRAGMA synchronous=NORMAL; PRAGMA wal_autocheckpoint=0;")
    except sqlite3.DatabaseError as error:
        file.close()
        raise CorruptDataError(_damaged(path, str(error))) from error
    except CorruptDataError:
        file.close()
        raise
    return file


def _row(run: str, group: Group) -> tuple[object, ...]:
    body = group_to_proto(group).SerializeToString()
    assert group.ended_at is not None
    oldest = group.ended_at.segment if group.oldest_segment is None else group.oldest_segment
    numbers = (group.created, int(group.purpose), int(group.state), group.step, group.place, int(group.is_dead_letter))
    return (run, *numbers, oldest, group.ended_at.segment, group.ended_at.offset, crc32c(body), body)


def _evaluation_row(run: str, state: EvaluationState, location: Location) -> tuple[object, ...]:
    body = evaluation_to_proto(state).SerializeToString()
    return (run, state.evaluation.evaluation_id, location.segment, location.offset, crc32c(body), body)


def _clauses(run: str, wanted: Filter) -> tuple[str, list[object]]:
    """A condition for SQL; its parts are fixed texts, the values are bound."""
    clauses, values = ["run = ?"], list[object]([run])
    if wanted.purpose is not None:
        clauses.append("purpose = ?")
        values.append(int(wanted.purpose))
    if wanted.state is not None:
        clauses.append("state = ?")
        values.append(int(wanted.state))
    if wanted.step:
        clauses.append("step = ? AND step > 0")
        values.append(min(wanted.step, _LARGEST))
    return " AND ".join(clauses), values


@contextmanager
def _reading(path: Path | None) -> Generator[None]:
    try:
        yield
    except sqlite3.DatabaseError as error:
        raise CorruptDataError(_damaged(path, str(error))) from error


def _damaged(path: Path | None, how: str) -> str:
    return f"{path}: {how}; stop the replay buffer and remove the file: it is made anew from the log"
