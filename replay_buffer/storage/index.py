"""The index: what has ended, by id, outside of memory. A cache of the log, never the truth.

    RunState ── put ──> recent (memory, about _MOST_RECENT) ── one transaction ──> index.sqlite
    reads            both as one view, by key or page by page; `recent` goes before the file

It is a file of SQLite in write-ahead mode: killed processes and power cuts leave it whole, though perhaps behind. So
`settle` writes down up to which place of the log it is complete, and a snapshot of that place exists only once that is
synced. What the index says beyond the place from which a restart folds is forgotten first; an index that is missing,
behind, damaged or of another log is rebuilt from the log. Once damage is met the file is not written any more; while
the disk is full what ends stays in memory.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from google.protobuf.message import DecodeError

from leeway.errors import CorruptDataError, InvalidDataError, LeewayError
from leeway.types import GroupState, Purpose
from leeway.v1 import storage_pb2
from replay_buffer.rules.groups import EvaluationState, Group, RecordHandle
from replay_buffer.storage.index_file import (
    DAMAGE,
    LARGEST,
    Filter,
    add_recent,
    check,
    clauses_of,
    connect,
    damaged,
    evaluation_row_of,
    oldest_segment,
    row_of,
)
from replay_buffer.storage.segments import Position, crc32c
from replay_buffer.storage.stored_state import evaluation_from_proto, group_from_proto

_MOST_RECENT: Final = 64
"""Ended groups that are written in one transaction."""
_PAGE: Final = 256


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
        self._file = connect(path, read_only=read_only)
        if not read_only:
            check(self._file, path)
        add_recent(self._file)
        self.num_recent = 0  # of both kinds
        self.is_damaged = False
        self.on_damage: Callable[[str], LeewayError] = lambda how: CorruptDataError(damaged(path, how))
        """Makes the error to raise when damage is met, from a description of it."""
        self.first_segment = 1
        """The oldest segment that there is; what has a record in an older one is retired."""

    @staticmethod
    def remove(path: Path) -> None:
        """Remove an index, in order to rebuild it."""
        for name in (path.name, f"{path.name}-wal", f"{path.name}-shm"):
            path.with_name(name).unlink(missing_ok=True)

    def close(self) -> None:
        """Write what is recent, as far as possible, and close the file."""
        with suppress(OSError):  # what is not written now is folded again
            self._write()
        self._file.close()

    # Where it stands

    def complete_to(self, generation: bytes) -> Position | None:
        """The place of the log up to which it is complete; None when it belongs to another log."""
        row = self._one("SELECT generation, segment, offset FROM complete")
        return Position(row[1], row[2]) if row is not None and row[0] == generation else None

    def settle(self, generation: bytes, position: Position) -> None:
        """Write what is recent; from now on it is complete up to `position`. Raises OSError when the disk is full."""
        self._write((generation, position))

    def sync(self) -> None:
        """Make everything written durable. Safe beside the other calls, in another thread.

        Raises:
            OSError: it cannot be written.
        """
        if self._path is not None:
            try:
                with closing(connect(self._path)) as file:
                    file.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            except sqlite3.Error as error:
                raise OSError(f"{self._path}: {error}") from error

    def forget_from(self, position: Position) -> None:
        """Forget what ended at `position` or later: it will be folded again."""
        self._write()
        with self._meeting_damage(), self._file:
            for table in ("groups", "evaluations"):
                self._file.execute(f"DELETE FROM {table} WHERE (ended_segment, ended_offset) >= (?, ?)", position)  # noqa: S608

    def forget_before(self, segment: int) -> None:
        """Forget what has records in older segments: they are retired."""
        self.first_segment = segment
        self._write()
        with self._meeting_damage(), self._file:
            self._file.execute("DELETE FROM groups WHERE oldest_segment < ?", (segment,))
            self._file.execute("DELETE FROM evaluations WHERE ended_segment < ?", (segment,))

    def oldest_replayable(self, run: str, after_step: int) -> int | None:
        """The oldest segment that holds something of what the run trained on after a step; None when none does."""
        self._write()
        row = self._one(
            "SELECT min(oldest_segment) FROM groups WHERE run = ? AND state = ? AND purpose = ? AND step > ?",
            *(run, int(GroupState.CONSUMED), int(Purpose.TRAIN), min(after_step, LARGEST)),
        )
        return None if row is None else row[0]

    # Writing

    def put(self, run: str, group: Group) -> None:
        """Take an ended group over."""
        oldest = oldest_segment(group)
        if oldest is not None and oldest < self.first_segment:
            return
        with self._file:
            self._file.execute(
                "INSERT OR REPLACE INTO recent.groups VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row_of(run, group)
            )
        self._one_more()

    def put_evaluation(self, run: str, state: EvaluationState, record: RecordHandle) -> None:
        """Take an ended evaluation over."""
        row = evaluation_row_of(run, state, record)
        with self._file:
            self._file.execute("INSERT OR REPLACE INTO recent.evaluations VALUES (?, ?, ?, ?, ?, ?)", row)
        self._one_more()

    def _one_more(self) -> None:
        self.num_recent += 1
        if self.num_recent >= _MOST_RECENT:
            with suppress(OSError):  # the disk is full: it stays in memory
                self._write()

    def _write(self, complete: tuple[bytes, Position] | None = None) -> None:
        if self._read_only or self.is_damaged or not (self.num_recent or complete):
            return
        try:
            with self._file:
                for table in ("groups", "evaluations"):
                    self._file.execute(f"INSERT OR REPLACE INTO {table} SELECT * FROM recent.{table}")  # noqa: S608
                    self._file.execute(f"DELETE FROM recent.{table}")  # noqa: S608
                if complete is not None:
                    self._file.execute("DELETE FROM complete")
                    self._file.execute("INSERT INTO complete VALUES (?, ?, ?)", (complete[0], *complete[1]))
        except sqlite3.OperationalError as error:  # the disk is full
            raise OSError(f"{self._path}: {error}") from error
        except DAMAGE as error:
            raise self._damage(str(error)) from error
        self.num_recent = 0

    # Reading

    def get(self, run: str, created: int) -> Group | None:
        """One group."""
        query = "SELECT checksum, body FROM every_group WHERE run = ? AND created = ?"
        row = self._one(query, run, min(created, LARGEST))
        return None if row is None else self._group(*row)

    def get_evaluation(self, run: str, evaluation_id: str) -> EvaluationState | None:
        """One evaluation."""
        query = "SELECT checksum, body FROM every_evaluation WHERE run = ? AND evaluation_id = ?"
        row = self._one(query, run, evaluation_id)
        if row is None:
            return None
        try:
            return evaluation_from_proto(storage_pb2.EvaluationSnapshot.FromString(self._checked(*row)))
        except (DecodeError, InvalidDataError) as error:
            raise self._damage(str(error)) from error

    def batch(self, run: str, step: int) -> tuple[str, ...]:
        """The ids of the groups that a committed step trained on, in order."""
        query = "SELECT place, checksum, body FROM every_group WHERE run = ? AND step = ? AND state = ?"
        rows = self._all(query, run, min(step, LARGEST), int(GroupState.CONSUMED)) if step else []
        return tuple(self._group(*row[1:]).group_id for row in sorted(rows))

    def created(self, run: str, wanted: Filter, *, newest: int = 0) -> Iterator[int]:
        """The numbers of matching groups, ascending, page by page; `newest` keeps only so many."""
        clauses, values = clauses_of(run, wanted)
        if newest:
            query = f"SELECT created FROM every_group WHERE {clauses} ORDER BY created DESC LIMIT ?"  # noqa: S608
            yield from sorted(number for (number,) in self._all(query, *values, newest))
            return
        query = f"SELECT created FROM every_group WHERE {clauses} AND created > ? ORDER BY created LIMIT {_PAGE}"  # noqa: S608
        page: list[tuple[Any, ...]] = [(0,)]
        while page := self._all(query, *values, page[-1][0]):
            yield from (number for (number,) in page)

    def dead_letters(self, run: str, newest: int) -> list[Group]:
        """Dead letters in the order of issue; at most so many, the newest."""
        query = (
            "SELECT created, checksum, body FROM every_group "
            "WHERE run = ? AND dead_letter = 1 ORDER BY created DESC LIMIT ?"
        )
        return [self._group(*row[1:]) for row in reversed(self._all(query, run, newest))]

    def first_whole_step(self, run: str, groups_per_step: int) -> int | None:
        """The oldest committed step of which no group has been retired."""
        self._write()
        row = self._one(
            "SELECT step FROM groups WHERE run = ? AND state = ? AND step > 0 "
            "GROUP BY step HAVING count(*) >= ? ORDER BY step LIMIT 1",
            *(run, int(GroupState.CONSUMED), groups_per_step),
        )
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
            with self._meeting_damage():
                for run, number, checksum, body in self._file.execute(query, before):
                    yield run, f"{name} {number}", self._checked(checksum, body)

    def _one(self, query: str, *values: object) -> tuple[Any, ...] | None:
        with self._meeting_damage():
            return self._file.execute(query, values).fetchone()

    def _all(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        with self._meeting_damage():
            return self._file.execute(query, values).fetchall()

    def _group(self, checksum: int, body: bytes) -> Group:
        try:
            return group_from_proto(storage_pb2.GroupSnapshot.FromString(self._checked(checksum, body)))
        except (DecodeError, InvalidDataError) as error:
            raise self._damage(str(error)) from error

    def _checked(self, checksum: int, body: bytes) -> bytes:
        if crc32c(body) != checksum:
            raise self._damage("an entry fails its checksum")
        return body

    @contextmanager
    def _meeting_damage(self) -> Generator[None]:
        try:
            yield
        except DAMAGE as error:
            raise self._damage(str(error)) from error

    def _damage(self, how: str) -> LeewayError:
        self.is_damaged = True
        return self.on_damage(how)
