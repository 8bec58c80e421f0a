"""`leeway buffer verify | ls | show | export`: reads a replay buffer's files, with or without a running buffer."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from leeway import codec
from leeway.cli.buffer_export import EXPORTED_STATES, FORMATS, OPTIONAL_COLUMNS, export_groups
from leeway.cli.command import Command, print_table
from leeway.cli.run_folder import is_run_folder, open_run_folder
from leeway.errors import ConfigError
from leeway.service.process import EXIT_FAILED, EXIT_OK
from leeway.types import GroupState, Purpose
from replay_buffer.rules.groups import Group, GroupMember, MemberProgress
from replay_buffer.rules.state import RunState
from replay_buffer.rules.transitions import ChunkWritten, TrajectoryClosed, TrajectoryFailed
from replay_buffer.storage.index_file import Filter
from replay_buffer.storage.offline import Directory, open_directory
from replay_buffer.storage.records import decode
from replay_buffer.storage.segments import list_segments, locations_of
from replay_buffer.storage.verification import verify

_STATES: Final = {state.name.lower(): state for state in GroupState}


def directory_of(path: Path) -> Path:
    """The log's directory: of a run, or the path itself."""
    if path.is_file() or is_run_folder(path):
        return open_run_folder(path).configuration.replay_buffer.directory
    return path


def _declare_path(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path",
        type=Path,
        metavar="PATH",
        help="a run's folder or configuration file, or the directory of a replay buffer",
    )


def _declare_ls(parser: argparse.ArgumentParser) -> None:
    _declare_path(parser)
    _add_filter(parser)
    parser.add_argument("--limit", type=int, default=20, metavar="N", help="newest groups to show (default 20; 0: all)")
    parser.add_argument("--segments", action="store_true", help="list the files of the log instead")


def _declare_show(parser: argparse.ArgumentParser) -> None:
    _declare_path(parser)
    parser.add_argument(
        "name", metavar="ID", help="a group such as sortmix8-g12, or a trajectory such as sortmix8-g12.0"
    )


def _declare_export(parser: argparse.ArgumentParser) -> None:
    _declare_path(parser)
    parser.add_argument("output", type=Path, metavar="FILE", help="new file that ends in .jsonl or .safetensors")
    _add_filter(parser)
    parser.add_argument(
        "--columns",
        type=lambda text: text.split(","),
        default=[],
        metavar="NAMES",
        help=f"columns besides tokens and log-probs, comma-separated: {', '.join(OPTIONAL_COLUMNS)}",
    )


def _add_filter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", default="", metavar="NAME", help="the run, if the log holds several")
    parser.add_argument("--state", choices=sorted(_STATES), help="only groups in this state")
    parser.add_argument("--step", type=int, default=0, metavar="STEP", help="only groups that this step trained on")
    parser.add_argument("--evaluation", action="store_true", help="held-out groups instead of training ones")


def _filter(arguments: argparse.Namespace) -> Filter:
    purpose = Purpose.EVAL if arguments.evaluation else Purpose.TRAIN
    return Filter(purpose, _STATES[arguments.state] if arguments.state else None, arguments.step)


def _verify(arguments: argparse.Namespace) -> int:
    """Check every byte of a log without changing it.

    Every record's checksum and every trajectory's digest are checked, and that the index and every snapshot match the
    log. Exit code 1 if there are problems.
    """
    report = verify(directory_of(arguments.path))
    print(
        f"{report.segments} segments, {report.size_bytes >> 20} MiB, {report.records} records, {report.closes} closes, "
        f"{report.snapshots} snapshots, {report.index_entries} index entries checked"
    )
    for note in report.notes:
        print(f"note: {note}")
    for problem in report.problems:
        print(f"problem: {problem}")
    count = len(report.problems)
    print(f"{count} problem{'s' if count > 1 else ''} found" if count else "OK")
    return EXIT_FAILED if report.problems else EXIT_OK


def _ls(arguments: argparse.Namespace) -> int:
    """List a log's runs and the newest groups of one."""
    path = directory_of(arguments.path)
    if arguments.segments and (segments := list_segments(path)):
        print_table(
            ("segment", "bytes", "newest record"),
            [(segment.number, segment.size_bytes, _time(segment.written_at)) for segment in segments],
        )
        return EXIT_OK
    directory = open_directory(path)
    try:
        for run in directory.runs.values():
            print(_described(run))
        run = directory.run(arguments.run)
        groups = directory.select(run, _filter(arguments), arguments.limit)
        print_table(
            ("group", "task", "state", "step", "attempt", "members", "server", "issued"),
            [_row(group) for group in groups],
        )
    finally:
        directory.close()
    return EXIT_OK


def _row(group: Group) -> tuple[object, ...]:
    done = f"{len(group.members) - len(group.missing)}/{len(group.members)}"
    issued = _time(group.issued_at_ns / 1e9)
    return (
        *(group.group_id, group.task_index, _state(group), group.step or "", group.attempt, done, group.server_id),
        issued,
    )


def _described(run: RunState) -> str:
    status = run.status()
    dropped = sum(status.dropped.values())
    return (
        f"run {run.spec.run}: {_standing(run)}, head {run.head}, "
        f"committed to step {run.committed_step}; of {status.issued} groups {status.open} open, {status.ready} ready, "
        f"{status.drawn} drawn, {status.consumed} consumed, {dropped} dropped"
    )


def _standing(run: RunState) -> str:
    if run.given_up:
        return f"given up at step {run.head.step} of {run.spec.total_steps}"
    return "finished" if run.finished else f"epoch {run.epoch}"


def _state(group: Group) -> str:
    reason = "" if group.drop_reason is None else f" ({group.drop_reason.name.lower()})"
    return group.state.name.lower() + reason


def _show(arguments: argparse.Namespace) -> int:
    """Show a group's state and its trajectories, or a trajectory's records and where they lie in the log."""
    directory = open_directory(directory_of(arguments.path))
    try:
        run, group, member = directory.find(arguments.name)
        print(
            f"group {group.group_id} of run {run.spec.run}, {group.purpose.name.lower()}, task {group.task_index}, "
            f"{_state(group)}{f', step {group.step}' if group.step else ''}, attempt {group.attempt}, issued "
            f"{_time(group.issued_at_ns / 1e9)} to {group.server_id}"
        )
        if group.drop_message:
            print(f"  {group.drop_message}")
        for each in group.members if member is None else [group.members[member]]:
            _show_member(directory, each, details=member is not None)
    finally:
        directory.close()
    return EXIT_OK


def _show_member(directory: Directory, member: GroupMember, *, details: bool) -> None:
    locations = locations_of(member)
    size_bytes = sum(location.size_bytes for location in locations)
    ending = "open"
    if member.progress is not MemberProgress.OPEN:
        match decode(directory.reader.read(locations[-1])).transition:
            case TrajectoryClosed(close=close):
                ending = f"{close.token_count} tokens, {close.finish_reason.name.lower()}, reward {close.reward:g}"
            case TrajectoryFailed(failure=failure):
                ending = f"failed: {failure.message}"
            case other:
                ending = f"ends with {type(other).__name__}"
    print(
        f"{member.trajectory_id}  attempt {member.attempt}, {member.server_id or 'no server'}, "
        f"{member.chunk_count} chunks, {size_bytes} bytes: {ending}"
    )
    if not details:
        return
    rows: list[tuple[object, ...]] = []
    for seq, location in enumerate(locations):
        written = decode(directory.reader.read(location)).transition
        columns = type(written).__name__
        if isinstance(written, ChunkWritten):
            chunk = codec.decode_chunk(written.chunk)
            columns = ", ".join(
                f"{column.kind.name.lower()} [{column.start_token}, {column.end_token})" for column in chunk.columns
            )
        rows.append((seq, location.segment, location.offset, location.size_bytes, columns))
    print_table(("seq", "segment", "byte", "bytes", "columns"), rows)


def _export(arguments: argparse.Namespace) -> int:
    """Write the complete trajectories of consumed, ready and drawn groups, or of --state.

    They have token ids, behavior log-probs, loss mask, version labels and rewards. JSONL has one line per trajectory.
    Safetensors has one array per column, with the trajectories concatenated and `offsets` [M + 1]; a large export is
    split into numbered files.
    """
    output: Path = arguments.output
    if output.suffix not in FORMATS:
        raise ConfigError(f"{output}: name a file that ends in {' or '.join(FORMATS)}")
    if unknown := set(arguments.columns) - set(OPTIONAL_COLUMNS):
        raise ConfigError(f"--columns: {', '.join(sorted(unknown))} is none of {', '.join(OPTIONAL_COLUMNS)}")
    directory = open_directory(directory_of(arguments.path))
    try:
        run, wanted = directory.run(arguments.run), _filter(arguments)
        groups = (
            group
            for group in directory.select(run, wanted)
            if wanted.state is not None or group.state in EXPORTED_STATES
        )
        exported = export_groups(directory, groups, output, arguments.columns)
    finally:
        directory.close()
    print(f"{exported.trajectories} trajectories of {exported.groups} groups, {exported.tokens} tokens:")
    for path in exported.paths:
        print(path)
    return EXIT_OK


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


COMMANDS: Final = (
    Command("verify", _verify, _declare_path, "check every byte of a log, its index and its snapshots"),
    Command("ls", _ls, _declare_ls, "list runs, groups or segments"),
    Command("show", _show, _declare_show, "show one group or trajectory"),
    Command("export", _export, _declare_export, "write trajectories as JSONL or safetensors"),
)
