"""The index: what has ended, by id, outside of memory. A cache of the log, never the truth.

    RunState ── put ──> waiting (memory, at most _WAITING) ── one transaction ──> index.sqlite
    reads            look at what waits first, then into the file; by key or page by page

It is a file of SQLite in write-ahead mode: killed processes and power cuts leave it whole, though perhaps behind. So
`settle` writes down up to which place of the log it is complete, and a snapshot of that place exists only once that is
synced. What the index says beyond the place from which a restart folds is forgotten first; an index that is missing,
behind, damaged or of another log is made anew from the log. Once damage is met the file is not written any more.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Final

from google.protobuf.message import DecodeError

from leeway.errors import CorruptDataError, InvalidDataError, LeewayError
from leeway.types import GroupState, Purpose
from leeway.v1 import storage_pb2
from replay_buffer.rules.groups import EvaluationState, Group, RecordHandle
from replay_buffer.storage.index_file import (
    DAMAGE,
    LARGEST,
    Filter,
    check,
    clauses_of,
    connect,
    damaged,
    evaluation_row_of,
    oldest_segment,
    row_of,
)
from replay_buffer.storage.segments import Position, crc32c
from replay_buffer.storage.stored_state import (
    evaluation_from_proto,
    group_from_proto,
)

_WAITING: Final = 64
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
        self._groups: dict[tuple[str, int], Group] = {}  # waiting to be written
        self._evaluations: dict[tuple[str, str], tuple[EvaluationState, RecordHandle]] = {}
        self._file = connect(path, read_only=read_only)
        if not read_only:
            check(self._file, path)
        self.is_damaged = False
        self.on_damage: Callable[[str], LeewayError] = lambda how: CorruptDataError(damaged(path, how))
        """What to raise when damage is met; told what it is."""
        self.first_segment = 1
        """The oldest segment that there is; what has a record in an older one is retired."""

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

    # Where it stands

    def complete_to(self, generation: bytes) -> Position | None:
        """The place of the log up to which it is complete; None when it belongs to another log."""
        with self._meeting_damage():
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
                with closing(connect(self._path)) as file:
                    file.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            except sqlite3.Error as error:
                raise OSError(f"{self._path}: {error}") from error

    def forget_from(self, position: Position) -> None:
        """Forget what ended at `position` or later: it will be folded again."""
        self._groups.clear()
        self._evaluations.clear()
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
        with self._meeting_damage():
            row = self._file.execute(
                "SELECT min(oldest_segment) FROM groups WHERE run = ? AND state = ? AND purpose = ? AND step > ?",
                (run, int(GroupState.CONSUMED), int(Purpose.TRAIN), min(after_step, LARGEST)),
            ).fetchone()
        return row[0]

    # Writing

    def put(self, run: str, group: Group) -> None:
        """Take an ended group over."""
        oldest = oldest_segment(group)
        if oldest is not None and oldest < self.first_segment:
            return
        self._groups[run, group.created] = group
        if len(self._groups) >= _WAITING:
            with suppress(OSError):  # the disk is full: it waits on in memory
                self._write()

    def put_evaluation(self, run: str, state: EvaluationState, record: RecordHandle) -> None:
        """Take an ended evaluation over."""
        self._evaluations[run, state.evaluation.evaluation_id] = (state, record)

    def _write(self, complete: tuple[bytes, Position] | None = None) -> None:
        if self._read_only or self.is_damaged or not (self._groups or self._evaluations or complete):
            return
        try:
            with self._file:
                self._file.executemany(
                    "INSERT OR REPLACE INTO groups VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    [row_of(run, group) for (run, _), group in self._groups.items()],
                )
                self._file.executemany(
                    "INSERT OR REPLACE INTO evaluations VALUES (?, ?, ?, ?, ?, ?)",
                    [evaluation_row_of(run, *entry) for (run, _), entry in self._evaluations.items()],
                )
                if complete is not None:
                    self._file.execute("DELETE FROM complete")
                    self._file.execute("INSERT INTO complete VALUES (?, ?, ?)", (complete[0], *complete[1]))
        except sqlite3.OperationalError as error:  # the disk is full: what waits stays in memory
            raise OSError(f"{self._path}: {error}") from error
        except DAMAGE as error:
            raise self._damage(str(error)) from error
        self._groups.clear()
        self._evaluations.clear()

    # Reading

    def get(self, run: str, created: int) -> Group | None:
        """One group."""
        waiting = self._groups.get((run, created))
        if waiting is not None:
            return waiting
        with self._meeting_damage():
            row = self._file.execute(
                "SELECT checksum, body FROM groups WHERE run = ? AND created = ?", (run, min(created, LARGEST))
            ).fetchone()
        return None if row is None else self._group(row)

    def get_evaluation(self, run: str, evaluation_id: str) -> EvaluationState | None:
        """One evaluation."""
        waiting = self._evaluations.get((run, evaluation_id))
        if waiting is not None:
            return waiting[0]
        with self._meeting_damage():
            row = self._file.execute(
                "SELECT checksum, body FROM evaluations WHERE run = ? AND evaluation_id = ?", (run, evaluation_id)
            ).fetchone()
        if row is None:
            return None
        try:
            return evaluation_from_proto(storage_pb2.EvaluationSnapshot.FromString(self._checked(row)))
        except (DecodeError, InvalidDataError) as error:
            raise self._damage(str(error)) from error

    def batch(self, run: str, step: int) -> tuple[str, ...]:
        """The ids of the groups that a committed step trained on, in order."""
        waiting = [
            group for (owner, _), group in self._groups.items() if (owner, group.step) == (run, step) and group.step
        ]
        with self._meeting_damage():
            rows = self._file.execute(
                "SELECT created, checksum, body FROM groups WHERE run = ? AND step = ? AND step > 0 AND state = ?",
                (run, min(step, LARGEST), int(GroupState.CONSUMED)),
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
        clauses, values = clauses_of(run, wanted)
        if newest:
            query = f"SELECT created FROM groups WHERE {clauses} ORDER BY created DESC LIMIT ?"  # noqa: S608
            with self._meeting_damage():
                found = [number for (number,) in self._file.execute(query, (*values, newest))]
            yield from sorted({*found, *extra})[-newest:]
            return
        query = f"SELECT created FROM groups WHERE {clauses} AND created > ? ORDER BY created LIMIT {_PAGE}"  # noqa: S608
        after = 0
        while True:
            with self._meeting_damage():
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
        with self._meeting_damage():
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
        with self._meeting_damage():
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
            with self._meeting_damage():
                for run, number, checksum, body in self._file.execute(query, before):
                    yield run, f"{name} {number}", self._checked((checksum, body))

    def _group(self, row: tuple[int, bytes]) -> Group:
        try:
            return group_from_proto(storage_pb2.GroupSnapshot.FromString(self._checked(row)))
        except (DecodeError, InvalidDataError) as error:
            raise self._damage(str(error)) from error

    def _checked(self, row: tuple[int, bytes]) -> bytes:
        checksum, body = row
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
