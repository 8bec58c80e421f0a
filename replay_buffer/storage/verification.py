"""Checks a whole directory: every record, and that everything beside the log is what the log says.

each record        its checksum, its meaning; gaps between segments; damage before the tail
each close         its digest, over the chunks that it seals
each snapshot      its checksum, and that it equals the fold of the log up to its place
the index          that every entry equals the fold of the log up to the place where it is complete
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

from leeway import codec
from leeway.errors import CorruptDataError, NotFoundError
from leeway.v1 import storage_pb2
from replay_buffer.rules.state import RunState
from replay_buffer.rules.transitions import (
    ChunkWritten,
    DeadLettersRequeued,
    RunRolledBack,
    TrajectoryClosed,
    TrajectoryFailed,
    Transition,
)
from replay_buffer.storage.index import Index
from replay_buffer.storage.index_file import FILE
from replay_buffer.storage.offline import Fold
from replay_buffer.storage.records import decode
from replay_buffer.storage.recovery import Start, base_of
from replay_buffer.storage.segments import HEADER, Location, Position, read_segment, segment_numbers, segment_path
from replay_buffer.storage.snapshots import (
    Generation,
    misfit,
    read_generation,
    read_snapshot,
    snapshot_path,
    snapshot_positions,
)
from replay_buffer.storage.stored_state import run_to_proto


@dataclass(slots=True)
class Report:
    """Counts of what was checked, and the problems found."""

    segments: int = 0
    records: int = 0
    size_bytes: int = 0
    closes: int = 0
    snapshots: int = 0
    index_entries: int = 0
    torn_bytes: int = 0  # of the last segment; the next start cuts them off
    notes: list[str] = field(default_factory=list[str])
    problems: list[str] = field(default_factory=list[str])


def verify(directory: Path) -> Report:
    """Check a directory without changing it.

    Raises:
        NotFoundError: it holds no log.
    """
    if not directory.is_dir() or not any(directory.glob("segment-*.log")):
        raise NotFoundError(f"{directory}: holds no log of a replay buffer (no segment-*.log)")
    report = Report()
    try:
        numbers = segment_numbers(directory)
        generation = read_generation(directory) or Generation(b"")
        with tempfile.TemporaryDirectory(prefix="leeway-verify-") as scratch:
            _Verification(directory, generation, numbers, report).run(Path(scratch) / FILE)
    except CorruptDataError as error:
        report.problems.append(error.message)
    return report


class _Verification:
    def __init__(self, directory: Path, generation: Generation, numbers: list[int], report: Report) -> None:
        self._directory = directory
        self._generation = generation
        self._numbers = numbers
        self._report = report
        self._digests: dict[str, tuple[int, int, bytes]] = {}  # trajectory: attempt, chunks, chain
        self._late: set[tuple[str, str]] = set()  # entries that changed after the index was complete
        self._snapshots = self._read_snapshots()

    def run(self, scratch: Path) -> None:
        """Fold everything once more, from the beginning, comparing on the way."""
        base, snapshot = base_of(self._directory, self._generation, self._warn)
        fold = Fold(Start(base, snapshot, Index(scratch), self._numbers[0]))
        try:
            end = self._fold(base, fold)
            # A segment begins with its first record: after a full one the next may not be there yet.
            for place in (end, Position(end.segment + 1, 0)):
                self._compare_snapshot(place, fold.runs.values())
            for position in self._snapshots:
                self._report.problems.append(
                    f"{snapshot_path(self._directory, position)}: no record begins at its place"
                )
            self._compare_index(fold.index)
        finally:
            fold.index.close()

    def _warn(self, message: str, *values: object) -> None:
        self._report.problems.append(message % values)

    def _read_snapshots(self) -> dict[Position, storage_pb2.Snapshot]:
        found: dict[Position, storage_pb2.Snapshot] = {}
        for position in snapshot_positions(self._directory):
            try:
                snapshot = read_snapshot(self._directory, position)
            except CorruptDataError as error:
                self._report.problems.append(error.message)
                continue
            reason = misfit(self._directory, snapshot, self._generation, self._numbers)
            if reason is not None:
                self._report.problems.append(f"{snapshot_path(self._directory, position)}: {reason}")
            elif position.segment >= self._numbers[0]:
                found[position] = snapshot
        return found

    def _fold(self, base: Position, fold: Fold) -> Position:
        """Every record; returns the end of the log."""
        end = base
        for number in self._numbers:
            path = segment_path(self._directory, number)
            self._report.segments += 1
            self._report.size_bytes += path.stat().st_size
            end = Position(number, 0)
            for offset, payload in self._records(path, last=number == self._numbers[-1]):
                self._report.records += 1
                place = Position(number, offset - HEADER.size)
                if place >= base:
                    self._compare_snapshot(place, fold.runs.values())
                    location = Location(number, offset, len(payload))
                    self._fold_record(fold, payload, location)
                end = Position(number, offset + len(payload))
        return end

    def _records(self, path: Path, *, last: bool) -> Iterator[tuple[int, bytes]]:
        torn_at = yield from read_segment(path, last=last)
        if torn_at is not None:
            self._report.torn_bytes = path.stat().st_size - torn_at
            self._report.notes.append(
                f"{path}: the last {self._report.torn_bytes} bytes are no whole record; "
                "a buffer is writing them, or the next start cuts them off"
            )

    def _fold_record(self, fold: Fold, payload: bytes, location: Location) -> None:
        try:
            record = decode(payload)
            self._check_digest(record.transition)
            run = fold.take(record, location)
            self._note_late(run, record.transition)
        except (CorruptDataError, AssertionError, KeyError, ValueError) as error:
            where = f"{segment_path(self._directory, location.segment)}: byte {location.offset - HEADER.size}"
            text = (
                error.message
                if isinstance(error, CorruptDataError)
                else f"does not follow from what came before: {error!r}"
            )
            raise CorruptDataError(f"{where}: {text}") from error

    def _check_digest(self, transition: Transition) -> None:
        match transition:
            case ChunkWritten(trajectory_id=name, attempt=attempt, seq=seq, chunk=chunk):
                before = self._digests.get(name, (attempt, -1, b"")) if seq else (attempt, 0, codec.EMPTY_CHAIN)
                if before[:2] == (attempt, seq):  # otherwise its first chunks are retired
                    self._digests[name] = (attempt, seq + 1, codec.chain_digest(before[2], chunk))
            case TrajectoryClosed(trajectory_id=name, attempt=attempt, close=close):
                sealed = self._digests.pop(name, None)
                if sealed is not None:
                    self._report.closes += 1
                    if sealed != (attempt, close.chunk_count, close.digest):
                        self._report.problems.append(f"trajectory {name}: its chunks are not what its close sealed")
            case TrajectoryFailed(trajectory_id=name):
                self._digests.pop(name, None)
            case _:
                pass

    def _note_late(self, run: RunState, transition: Transition) -> None:
        """Remember what changes an entry again, which the index may or may not have seen."""
        match transition:
            case RunRolledBack(group_ids=group_ids) | DeadLettersRequeued(group_ids=group_ids):
                changed = group_ids
            case TrajectoryFailed(trajectory_id=trajectory_id):
                changed = (trajectory_id.rpartition(".")[0],)
            case _:
                return
        name = run.spec.run
        self._late.update((name, f"groups {group_id.removeprefix(f'{name}-g')}") for group_id in changed)

    def _compare_snapshot(self, place: Position, runs: Iterable[RunState]) -> None:
        """Compare the snapshot of a place, if there is one, with the state there."""
        snapshot = self._snapshots.pop(place, None)
        if snapshot is None:
            return
        self._report.snapshots += 1
        if list(snapshot.runs) != [run_to_proto(state) for state in runs]:
            path = snapshot_path(self._directory, place)
            self._report.problems.append(f"{path}: differs from what the log says; stop the buffer and remove it")

    def _compare_index(self, folded: Index) -> None:
        path = self._directory / FILE
        if not path.exists():
            self._report.notes.append(f"{path}: is missing; the next start rebuilds it")
            return
        index = Index(path, read_only=True)
        try:
            complete_to = index.complete_to(self._generation.id)
            if complete_to is None:
                self._report.notes.append(f"{path}: is of another log; the next start rebuilds it")
                return
            for stored, right in zip_longest(index.entries(complete_to), folded.entries(complete_to)):
                self._report.index_entries += 1
                if stored != right and not (stored and right and stored[:2] == right[:2] and stored[:2] in self._late):
                    run, name, _ = stored or right
                    self._report.problems.append(
                        f"{path}: from {name} of run {run!r} on it differs from what the log says; "
                        "stop the buffer and remove it"
                    )
                    return
        finally:
            index.close()
