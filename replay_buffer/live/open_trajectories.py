"""Trajectories that are being written: of each, the few numbers by which its close will be judged.

They are in memory only. One that is not known from its first chunk on (the process has started since, or too many
others were written in between) is read again from the log when its trajectory closes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from leeway import codec
from leeway.trajectory.check import TrajectoryCheck
from leeway.types import PolicyVersion
from replay_buffer.rules.groups import GroupMember, RecordHandle

_MOST_OPEN: Final = 16_384

ReadChunk = Callable[[RecordHandle], bytes]


class OpenTrajectories:
    """Checks in progress, by trajectory and attempt; the one that was written to least recently is forgotten first."""

    def __init__(self, most: int = _MOST_OPEN) -> None:
        self._most = most
        self._checks: OrderedDict[tuple[str, int], TrajectoryCheck] = OrderedDict()

    def add(self, member: GroupMember, chunk: bytes) -> tuple[PolicyVersion, ...]:
        """The next chunk of a member; returns the versions of its tokens.

        Raises:
            InvalidDataError: the bytes are not a TrajectoryChunk; its check stays as it is.
        """
        key, written = (member.trajectory_id, member.attempt), len(member.records)
        check = self._checks.get(key)
        if not written:
            check = TrajectoryCheck()
        elif check is None or check.num_chunks != written:
            return codec.chunk_versions(chunk)
        versions = check.add(chunk)
        self._checks[key] = check
        self._checks.move_to_end(key)
        if len(self._checks) > self._most:
            self._checks.popitem(last=False)
        return versions

    def whole(self, member: GroupMember, read: ReadChunk) -> TrajectoryCheck:
        """Everything that was written of a member, which is about to end.

        Raises:
            CorruptDataError: a chunk is damaged on disk.
        """
        check = self._checks.pop((member.trajectory_id, member.attempt), None)
        if check is None or check.num_chunks != len(member.records):
            check = TrajectoryCheck()
            for record in member.records:
                check.add(read(record))
        return check
