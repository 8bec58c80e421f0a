"""Trajectories that are being written, as far as their closes will be judged: never more than a few numbers each.

Kept in memory only. A draft that is not known from its first chunk on (the process has started since, or too many
others were written meanwhile) is made again from the log when its trajectory closes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from leeway import codec
from leeway.trajectory.check import TrajectoryCheck
from leeway.types import PolicyVersion
from replay_buffer.rules.groups import Location, Member

_MOST_DRAFTS: Final = 16_384

ReadChunk = Callable[[Location], bytes]


class Drafts:
    """Drafts by trajectory and attempt; the one that was written to least recently is forgotten first."""

    def __init__(self, most: int = _MOST_DRAFTS) -> None:
        self._most = most
        self._drafts: OrderedDict[tuple[str, int], TrajectoryCheck] = OrderedDict()

    def add(self, member: Member, chunk: bytes) -> tuple[PolicyVersion, ...]:
        """The next chunk of a member; returns the versions of its tokens.

        Raises:
            InvalidDataError: the bytes are not a TrajectoryChunk; the draft stays as it is.
        """
        key, written = (member.trajectory_id, member.attempt), len(member.records)
        draft = self._drafts.get(key)
        if not written:
            draft = TrajectoryCheck()
        elif draft is None or draft.num_chunks != written:
            return codec.chunk_versions(chunk)
        versions = draft.add(chunk)
        self._drafts[key] = draft
        self._drafts.move_to_end(key)
        if len(self._drafts) > self._most:
            self._drafts.popitem(last=False)
        return versions

    def whole(self, member: Member, read: ReadChunk) -> TrajectoryCheck:
        """Everything that was written of a member, which is about to end.

        Raises:
            CorruptDataError: a chunk is damaged on disk.
        """
        draft = self._drafts.pop((member.trajectory_id, member.attempt), None)
        if draft is None or draft.num_chunks != len(member.records):
            draft = TrajectoryCheck()
            for location in member.records:
                draft.add(read(location))
        return draft
