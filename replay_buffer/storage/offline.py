"""A directory as it is on disk, read without changing it: beside a running buffer, or without one.

A snapshot and the index shorten the way where they fit; what came later is folded in memory. Beside a running one this
shows what was on disk when it was opened.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from leeway.errors import CorruptDataError, NotFoundError
from replay_buffer.rules.fold import apply
from replay_buffer.rules.groups import Group
from replay_buffer.rules.state import RunState
from replay_buffer.rules.transitions import RunOpened
from replay_buffer.storage.index import Index
from replay_buffer.storage.index_file import Filter
from replay_buffer.storage.records import Record, decode
from replay_buffer.storage.recovery import Start, choose_start
from replay_buffer.storage.run_index import RunIndex, check_kept, select
from replay_buffer.storage.segment_reader import SegmentReader
from replay_buffer.storage.segments import Location, read_segment, segment_numbers, segment_path
from replay_buffer.storage.snapshots import Generation, read_generation


class Fold:
    """The state of every run of a log, record by record."""

    def __init__(self, start: Start) -> None:
        self.index = start.index
        self.index.first_segment = start.first_segment
        self.runs = start.runs()

    def take(self, record: Record, location: Location) -> RunState:
        """Fold one record in; returns its run.

        Raises:
            CorruptDataError: its run was never opened.
        """
        run = self.runs.get(record.run)
        if run is None:
            if not isinstance(record.transition, RunOpened):
                raise CorruptDataError(f"run {record.run!r} goes on before it was opened")
            run = self.runs[record.run] = RunState(record.transition.spec, RunIndex(self.index, record.run))
        apply(run, record.transition, record.recorded_at_ns, location.handle)
        return run


@dataclass(frozen=True, slots=True)
class Directory:
    """An opened directory."""

    path: Path
    generation: Generation
    runs: dict[str, RunState]
    index: Index
    reader: SegmentReader

    def run(self, name: str = "") -> RunState:
        """A run by its name; without one, the only run there is.

        Raises:
            NotFoundError: there is none of this name, or several to choose from.
        """
        there = ", ".join(self.runs) or "none"
        if not name and len(self.runs) == 1:
            return next(iter(self.runs.values()))
        if not name:
            raise NotFoundError(f"{self.path}: name a run with --run; there are: {there}")
        if name not in self.runs:
            raise NotFoundError(f"{self.path}: no run {name!r}; there are: {there}")
        return self.runs[name]

    def select(self, run: RunState, wanted: Filter, limit: int = 0) -> Iterator[Group]:
        """Groups that match, in the order of issue; a limit keeps the newest.

        Raises:
            NotFoundError: the groups of the step that is asked for have been retired.
        """
        check_kept(run, wanted)
        for group_id in select(run, wanted, limit):
            group = run.groups.get(group_id)
            if group is not None:
                yield group

    def find(self, name: str) -> tuple[RunState, Group, int | None]:
        """A group, or a trajectory with its place in it, by id.

        Raises:
            NotFoundError: there is none.
        """
        for run in self.runs.values():
            group = run.groups.get(name)
            if group is not None:
                return run, group, None
            found = run.find(name)
            if found is not None:
                return run, *found
            if run.is_retired(name) or run.is_retired(f"{name}.0"):
                raise NotFoundError(f"{self.path}: {name} has been retired")
        raise NotFoundError(f"{self.path}: no group or trajectory {name!r}")

    def close(self) -> None:
        """Close every file."""
        self.reader.close()
        self.index.close()


def open_directory(path: Path) -> Directory:
    """Bring the state of a directory back without changing it.

    Raises:
        NotFoundError: it holds no log.
        CorruptDataError: the log is damaged.
    """
    numbers = segment_numbers(path) if path.is_dir() else []
    if not numbers:
        raise NotFoundError(f"{path}: holds no log of a replay buffer (no segment-*.log)")
    generation = read_generation(path) or Generation(b"")
    start = choose_start(path, generation, _ignore, read_only=True)
    position, fold = start.position, Fold(start)
    for number in numbers:
        if number >= position.segment:
            begin = position.offset if number == position.segment else 0
            for offset, payload in read_segment(segment_path(path, number), last=number == numbers[-1], start=begin):
                fold.take(decode(payload), Location(number, offset, len(payload)))
    return Directory(path, generation, fold.runs, fold.index, SegmentReader(path))


def _ignore(*_: object) -> None:
    """Say nothing about files that are passed over: `leeway buffer verify` names them."""
