"""A directory as it is on disk, read without changing it: beside a running buffer, or without one.

A snapshot and the index shorten the way where they fit; what came later is folded in memory. Beside a running one this
shows what was on disk when it was opened.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from leeway.errors import CorruptDataError, NotFoundError
from leeway.v1 import storage_pb2
from replay_buffer.rules.fold import apply
from replay_buffer.rules.groups import Group
from replay_buffer.rules.state import RunState
from replay_buffer.rules.transitions import RunOpened
from replay_buffer.storage.generation import Generation, read_generation
from replay_buffer.storage.index import Index
from replay_buffer.storage.index_file import FILE, Filter
from replay_buffer.storage.records import Record, decode
from replay_buffer.storage.recovery import base_of, fitting_snapshot
from replay_buffer.storage.run_index import RunIndex
from replay_buffer.storage.segment_reader import SegmentReader
from replay_buffer.storage.segment_scan import read_segment
from replay_buffer.storage.segments import Location, Position, segment_numbers, segment_path
from replay_buffer.storage.selection import check_kept, select
from replay_buffer.storage.snapshots import snapshot_positions
from replay_buffer.storage.stored_state import run_from_proto


class Fold:
    """The state of every run of a log, record by record."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.runs: dict[str, RunState] = {}

    def restore(self, snapshot: storage_pb2.Snapshot) -> None:
        """Begin with the runs of a snapshot."""
        self.runs = {run.spec.run: run_from_proto(run, RunIndex(self.index, run.spec.run)) for run in snapshot.runs}

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
    start, fold = _start(path, generation, numbers)
    for number in numbers:
        if number >= start.segment:
            begin = start.offset if number == start.segment else 0
            for offset, payload in read_segment(segment_path(path, number), last=number == numbers[-1], start=begin):
                fold.take(decode(payload), Location(number, offset, len(payload)))
    return Directory(path, generation, fold.runs, fold.index, SegmentReader(path))


def _start(path: Path, generation: Generation, numbers: list[int]) -> tuple[Position, Fold]:
    """From where to fold, with the runs as they are there."""
    index = _open_index(path / FILE)
    complete_to = None if index is None else index.complete_to(generation.id)
    if index is not None and complete_to is not None:
        for position in reversed([at for at in snapshot_positions(path) if at <= complete_to]):
            snapshot = fitting_snapshot(path, position, generation, numbers, _ignore)
            if snapshot is not None:
                fold = Fold(index)
                fold.restore(snapshot)
                index.first_segment = numbers[0]
                return position, fold
    if index is not None:
        index.close()
    position, snapshot = base_of(path, generation, _ignore)
    fold = Fold(Index())
    if snapshot is not None:
        fold.restore(snapshot)
    fold.index.first_segment = numbers[0]
    return position, fold


def _open_index(path: Path) -> Index | None:
    if not path.exists():
        return None
    try:
        return Index(path, read_only=True)
    except CorruptDataError:
        return None


def _ignore(*_: object) -> None:
    """What is passed over is named by `leeway buffer verify`."""
