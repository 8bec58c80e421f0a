"""Retention: the segments of the log that may be deleted.

    needed    by what is live (OPEN, READY, DRAWN), and by what a step trained on that comes after the learner's oldest
              kept checkpoint: it may be computed again, or rolled back to; a finished run needs that only as long as
              no other run goes on in the directory
    wanted    as long as the log is smaller than retain_bytes, and a segment younger than retain_seconds

Whole segments go, oldest first, up to the first that is needed: nothing is rewritten forward. What pins a segment is
bounded (live groups by the staleness bound and their leases, replayable ones by the checkpoints that are kept), so the
log is as large as that plus what is wanted, and a record never moves: its location stays valid. A finished run
pins nothing that grows: while it is alone nothing is written, and once another run goes on it lets go.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from replay_buffer.rules.state import RunState
from replay_buffer.storage.index import Index
from replay_buffer.storage.index_file import oldest_segment
from replay_buffer.storage.segments import Segment


def first_live(states: Iterable[RunState], newest: int) -> int:
    """The oldest segment that something live lies in; `newest` is the one that is written to."""
    live = (oldest_segment(group) for state in states for group in state.groups.unended.values())
    return min((segment for segment in live if segment is not None), default=newest)


def first_needed(states: Iterable[RunState], index: Index, newest: int) -> int:
    """The oldest segment that has to stay; `newest` is the one that is written to."""
    known = list(states)
    needed = first_live(known, newest)
    others_go_on = any(not state.finished for state in known)
    for state in known:
        if state.finished and others_go_on:
            continue
        replayable = index.oldest_replayable(state.spec.run, state.oldest_kept_step)
        needed = min(needed, newest if replayable is None else replayable)
    return needed


def choose_beginning(
    segments: Sequence[Segment],
    beginnings: Iterable[int],
    needed: int,
    now: float,
    *,
    retain_bytes: int | None,
    retain_seconds: float | None,
) -> int | None:
    """The segment that the log shall begin with; None when it stays as it is.

    Args:
        segments: all of them, oldest first.
        beginnings: segments of whose beginning a snapshot is durable.
        needed: the oldest one that has to stay.
        now: Unix time.
        retain_bytes: beyond this size of the log the oldest go; None: never for it.
        retain_seconds: beyond this age they go; None: never for it.
    """
    sizes: Mapping[int, int] = {segment.number: segment.size_bytes for segment in segments}
    total = sum(sizes.values())
    chosen: int | None = None
    for beginning in sorted(beginnings):
        if beginning > needed or beginning <= segments[0].number:
            continue
        gone = [segment for segment in segments if segment.number < beginning]
        too_old = retain_seconds is not None and gone[-1].written_at <= now - retain_seconds
        # The one before would leave too much.
        kept_before = total - sum(sizes[number] for number in sizes if number < (chosen or segments[0].number))
        too_large = retain_bytes is not None and kept_before > retain_bytes
        if not (too_old or too_large):
            break
        chosen = beginning
    return chosen
