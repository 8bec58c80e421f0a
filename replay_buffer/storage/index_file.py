"""The index as a file of SQLite: its tables and rows, and how damage of it is met.

It is checked when it is opened, and every entry carries a checksum besides.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Final, NamedTuple

from leeway.errors import CorruptDataError
from leeway.types import GroupState, Purpose
from replay_buffer.rules.groups import EvaluationState, Group, RecordHandle
from replay_buffer.storage.segments import Location, crc32c
from replay_buffer.storage.stored_state import evaluation_to_proto, group_to_proto

FILE: Final = "index.sqlite"
_VERSION: Final = 3
LARGEST: Final = (1 << 63) - 1
"""SQLite's largest integer; no group has such a number or step."""

DAMAGE: Final = (sqlite3.DatabaseError, UnicodeDecodeError)
"""Errors that a damaged file raises; the second when a message quotes a name that is no longer text."""

_TABLES: Final = """
CREATE TABLE {0}groups (
    run TEXT, created INTEGER, purpose INTEGER, state INTEGER, step INTEGER, place INTEGER,
    dead_letter INTEGER, oldest_segment INTEGER, ended_segment INTEGER, ended_offset INTEGER,
    checksum INTEGER, body BLOB,
    PRIMARY KEY (run, created)
) WITHOUT ROWID;
CREATE TABLE {0}evaluations (
    run TEXT, evaluation_id TEXT, ended_segment INTEGER, ended_offset INTEGER, checksum INTEGER, body BLOB,
    PRIMARY KEY (run, evaluation_id)
) WITHOUT ROWID;
"""
_SCHEMA: Final = f"""
CREATE TABLE complete (generation BLOB, segment INTEGER, offset INTEGER);
{_TABLES.format("")}
CREATE INDEX groups_by_step ON groups (run, step, place);
CREATE INDEX dead_letters ON groups (run, created) WHERE dead_letter = 1;
CREATE INDEX groups_by_segment ON groups (oldest_segment);
CREATE INDEX groups_by_end ON groups (ended_segment, ended_offset);
"""
_STATISTICS: Final = """
ANALYZE;
INSERT INTO sqlite_stat1 VALUES ('groups', 'groups', '1000000 1000000 1'),
    ('groups', 'groups_by_step', '1000000 1000000 100 1'), ('groups', 'dead_letters', '1000 1000 1');
ANALYZE sqlite_schema;
"""
"""They tell the planner that a run has many groups, of which those of a step and the dead letters are few."""
_VIEWS: Final = """
CREATE TEMP VIEW every_group AS SELECT * FROM recent.groups UNION ALL SELECT * FROM main.groups AS one
    WHERE NOT EXISTS (SELECT 1 FROM recent.groups AS other WHERE other.run = one.run AND other.created = one.created);
CREATE TEMP VIEW every_evaluation AS SELECT * FROM recent.evaluations UNION ALL SELECT * FROM main.evaluations AS one
    WHERE NOT EXISTS (SELECT 1 FROM recent.evaluations AS other
        WHERE other.run = one.run AND other.evaluation_id = one.evaluation_id);
"""


class Filter(NamedTuple):
    """Which groups are asked for; None and 0 stand for all."""

    purpose: Purpose | None = None
    state: GroupState | None = None
    step: int = 0

    def matches(self, group: Group) -> bool:
        """True for a group that is one of them."""
        return (
            (self.purpose is None or group.purpose is self.purpose)
            and (self.state is None or group.state is self.state)
            and (not self.step or group.step == self.step)
        )


def check(file: sqlite3.Connection, path: Path | None) -> None:
    """Refuse a damaged file before anything depends on it.

    Raises:
        CorruptDataError: it is damaged; it is closed then.
    """
    try:
        found: str = file.execute("PRAGMA quick_check(1)").fetchone()[0]
    except DAMAGE as error:
        found = str(error)
    if found != "ok":
        file.close()
        raise CorruptDataError(damaged(path, " ".join(found.split())))


def connect(path: Path | None, *, read_only: bool = False) -> sqlite3.Connection:
    """Open the file, or make it; without a path it lives in memory.

    Raises:
        CorruptDataError: it is not an index that can be used.
    """
    try:
        if path is not None and read_only:
            # Without a write-ahead log beside it no process writes it, and reading it must not make one.
            how = "mode=ro" if path.with_name(f"{path.name}-wal").exists() else "immutable=1"
            file = sqlite3.connect(f"{path.absolute().as_uri()}?{how}", uri=True, check_same_thread=False)
        else:
            file = sqlite3.connect(path or ":memory:", check_same_thread=False)
    except sqlite3.Error as error:
        raise CorruptDataError(damaged(path, str(error))) from error
    try:
        if file.execute("PRAGMA user_version").fetchone()[0] != _VERSION:
            if read_only or file.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
                raise CorruptDataError(damaged(path, "it has another version"))
            file.executescript(f"PRAGMA journal_mode=WAL; {_SCHEMA} {_STATISTICS} PRAGMA user_version={_VERSION};")
        # Whole after a power cut, though perhaps behind. Only `sync` waits for the disk.
        if not read_only:
            file.executescript("PRAGMA synchronous=NORMAL; PRAGMA wal_autocheckpoint=0;")
    except DAMAGE as error:
        file.close()
        raise CorruptDataError(damaged(path, str(error))) from error
    except CorruptDataError:
        file.close()
        raise
    return file


def add_recent(file: sqlite3.Connection) -> None:
    """Beside the file's tables: the same in memory, for what is not written yet, and views of both."""
    file.executescript(f"ATTACH ':memory:' AS recent; {_TABLES.format('recent.')} {_VIEWS}")


def oldest_segment(group: Group) -> int | None:
    """The oldest segment that holds something of a group; None before the first write."""
    first = (Location.of(member.records[0]).segment for member in group.members if len(member.records))
    return min(first, default=None)


def row_of(run: str, group: Group) -> tuple[object, ...]:
    """A row of `groups`."""
    body = group_to_proto(group).SerializeToString()
    assert group.ended_at is not None
    ended_at, oldest = Location.of(group.ended_at), oldest_segment(group)
    numbers = (group.created, int(group.purpose), int(group.state), group.step, group.place, int(group.is_dead_letter))
    return (
        run,
        *numbers,
        ended_at.segment if oldest is None else oldest,
        ended_at.segment,
        ended_at.offset,
        crc32c(body),
        body,
    )


def evaluation_row_of(run: str, state: EvaluationState, record: RecordHandle) -> tuple[object, ...]:
    """A row of `evaluations`, for one that this record ended."""
    location = Location.of(record)
    body = evaluation_to_proto(state).SerializeToString()
    return (run, state.evaluation.evaluation_id, location.segment, location.offset, crc32c(body), body)


def clauses_of(run: str, wanted: Filter) -> tuple[str, list[object]]:
    """A condition for SQL; its parts are fixed texts, the values are bound."""
    clauses, values = ["run = ?"], list[object]([run])
    if wanted.purpose is not None:
        clauses.append("purpose = ?")
        values.append(int(wanted.purpose))
    if wanted.state is not None:
        clauses.append("state = ?")
        values.append(int(wanted.state))
    if wanted.step:
        clauses.append("step = ?")
        values.append(min(wanted.step, LARGEST))
    return " AND ".join(clauses), values


def damaged(path: Path | None, how: str) -> str:
    """The message about a damaged file that no running buffer holds."""
    return f"{path}: {how}; stop the replay buffer and remove the file; the next start rebuilds it from the log"
