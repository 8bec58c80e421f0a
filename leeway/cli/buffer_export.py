"""Trajectories of a replay buffer's log as JSONL or safetensors, a few at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors.numpy import save_file  # pyright: ignore[reportUnknownVariableType]

from leeway.errors import PreconditionError
from leeway.trajectory.assembly import join_chunks
from leeway.types import Array, ColumnKind, GroupState, Trajectory, TrajectoryRecord
from replay_buffer.rules.groups import Group, GroupMember, MemberProgress
from replay_buffer.rules.transitions import TrajectoryClosed
from replay_buffer.storage.offline import Directory
from replay_buffer.storage.records import decode
from replay_buffer.storage.segment_reader import ColumnReader
from replay_buffer.storage.segments import locations_of

FORMATS: Final = (".jsonl", ".safetensors")
EXPORTED_STATES: Final = (GroupState.READY, GroupState.DRAWN, GroupState.CONSUMED)
"""Exported unless --state names another one: whole groups that passed every check."""
OPTIONAL_COLUMNS: Final[Mapping[str, tuple[ColumnKind, ...]]] = {
    "topk": (ColumnKind.TOPK_TOKEN_IDS, ColumnKind.TOPK_LOGPROBS),
    "routing": (ColumnKind.ROUTING,),
}
_ALWAYS: Final = (ColumnKind.TOKEN_IDS, ColumnKind.BEHAVIOR_LOGPROBS)
_FILE_BYTES: Final = 256 << 20
"""Arrays that one safetensors file may hold: it has to fit into memory."""


@dataclass(slots=True)
class Exported:
    """Counts and files of an export."""

    groups: int = 0
    trajectories: int = 0
    tokens: int = 0
    paths: list[Path] = field(default_factory=list[Path])


def export_groups(directory: Directory, groups: Iterable[Group], output: Path, columns: Sequence[str]) -> Exported:
    """Write the complete trajectories of groups; columns that are not named are not read.

    Raises:
        PreconditionError: a file of the export exists already.
        CorruptDataError: the log is damaged.
    """
    kinds = {*_ALWAYS, *(kind for name in columns for kind in OPTIONAL_COLUMNS[name])}
    exported = Exported()
    trajectories = _trajectories(directory, groups, kinds, exported)
    if output.suffix == ".jsonl":
        _write_jsonl(trajectories, output, exported)
    else:
        _write_safetensors(trajectories, output, exported)
    return exported


_Item = tuple[Group, Trajectory]


def _trajectories(
    directory: Directory, groups: Iterable[Group], kinds: set[ColumnKind], exported: Exported
) -> Iterator[_Item]:
    reader = ColumnReader(directory.path)
    for group in groups:
        exported.groups += 1
        for index, member in enumerate(group.members):
            if member.progress is MemberProgress.CLOSED:
                trajectory = _read(directory, reader, member, index, kinds)
                exported.trajectories += 1
                exported.tokens += len(trajectory.token_ids)
                yield group, trajectory


def _read(
    directory: Directory, reader: ColumnReader, member: GroupMember, index: int, kinds: set[ColumnKind]
) -> Trajectory:
    *chunks, ending = locations_of(member)
    closed = decode(directory.reader.read(ending)).transition
    assert isinstance(closed, TrajectoryClosed)
    record = TrajectoryRecord(member.trajectory_id, index, member.attempt, member.server_id, closed.close, "", ())
    return join_chunks([reader.read(location, kinds) for location in chunks], record, closed.close)


def _write_jsonl(trajectories: Iterator[_Item], output: Path, exported: Exported) -> None:
    try:
        file = output.open("x", encoding="utf-8")
    except FileExistsError as error:
        raise PreconditionError(f"{output} exists; remove it or choose another file") from error
    with file:
        for group, trajectory in trajectories:
            file.write(json.dumps(_line(group, trajectory), allow_nan=False) + "\n")
    exported.paths.append(output)


def _line(group: Group, trajectory: Trajectory) -> Mapping[str, Any]:
    line: dict[str, Any] = {
        "group_id": group.group_id,
        "task_index": group.task_index,
        "state": group.state.name.lower(),
        "step": group.step or None,
        "trajectory_id": trajectory.trajectory_id,
        "member": trajectory.member,
        "attempt": trajectory.attempt,
        "server_id": trajectory.server_id,
        "reward": trajectory.reward,
        "finish_reason": trajectory.finish_reason.name.lower(),
        "versions": [
            [span.start_token, span.end_token, span.version.epoch, span.version.step]
            for span in trajectory.version_spans
        ],
        "token_ids": trajectory.token_ids.tolist(),
        "behavior_logprobs": trajectory.behavior_logprobs.astype(float).tolist(),
        "loss_mask": trajectory.loss_mask.astype(int).tolist(),
    }
    if trajectory.topk_token_ids is not None and trajectory.topk_logprobs is not None:
        line["topk_token_ids"] = trajectory.topk_token_ids.tolist()
        line["topk_logprobs"] = trajectory.topk_logprobs.astype(float).tolist()
    if trajectory.routing is not None:
        line["routing"] = trajectory.routing.tolist()
    return line


def _write_safetensors(trajectories: Iterator[_Item], output: Path, exported: Exported) -> None:
    waiting: list[_Item] = []
    size_bytes = 0
    for item in trajectories:
        waiting.append(item)
        size_bytes += sum(array.nbytes for array in _token_columns(item[1]).values())
        if size_bytes >= _FILE_BYTES:
            _save(waiting, _numbered(output, len(exported.paths) + 1), exported)
            waiting, size_bytes = [], 0
    if waiting or not exported.paths:
        _save(waiting, _numbered(output, len(exported.paths) + 1) if exported.paths else output, exported)


def _numbered(output: Path, number: int) -> Path:
    return output.with_name(f"{output.stem}-{number:05d}{output.suffix}")


def _save(items: Sequence[_Item], path: Path, exported: Exported) -> None:
    if path.exists():
        raise PreconditionError(f"{path} exists; remove it or choose another file")
    trajectories = [trajectory for _, trajectory in items]
    lengths = [len(trajectory.token_ids) for trajectory in trajectories]
    arrays: dict[str, Array] = {
        "offsets": np.cumsum([0, *lengths], dtype=np.int64),
        "reward": np.array([trajectory.reward for trajectory in trajectories], np.float64),
        "task_index": np.array([group.task_index for group, _ in items], np.int64),
        "step": np.array([group.step for group, _ in items], np.int64),
        "member": np.array([trajectory.member for trajectory in trajectories], np.int32),
    }
    columns = [_token_columns(trajectory) for trajectory in trajectories]
    for name in columns[0] if columns else ():
        arrays[name] = np.concatenate([column[name] for column in columns])
    ids = json.dumps([trajectory.trajectory_id for trajectory in trajectories])
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path, {"trajectory_ids": ids})
    exported.paths.append(path)


def _token_columns(trajectory: Trajectory) -> dict[str, Array]:
    """Arrays with one row per token; version labels are -1 where nothing was sampled."""
    n = len(trajectory.token_ids)
    epochs, steps = np.full(n, -1, np.int64), np.full(n, -1, np.int64)
    for span in trajectory.version_spans:
        epochs[span.start_token : span.end_token] = span.version.epoch
        steps[span.start_token : span.end_token] = span.version.step
    columns: dict[str, Array] = {
        "token_ids": trajectory.token_ids,
        "behavior_logprobs": trajectory.behavior_logprobs,
        "loss_mask": trajectory.loss_mask,
        "version_epoch": epochs,
        "version_step": steps,
    }
    if trajectory.topk_token_ids is not None and trajectory.topk_logprobs is not None:
        columns |= {"topk_token_ids": trajectory.topk_token_ids, "topk_logprobs": trajectory.topk_logprobs}
    if trajectory.routing is not None:
        last = np.zeros((n - len(trajectory.routing), *trajectory.routing.shape[1:]), trajectory.routing.dtype)
        columns["routing"] = np.concatenate([trajectory.routing, last])
    return columns
