"""What the buffer tells whoever watches it, and what a transition says about the groups that it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from leeway.types import DropReason, Purpose, WriteItem, WriteResult
from replay_buffer.live.servers import Fleet
from replay_buffer.rules.leases import Leases
from replay_buffer.rules.state import RunState
from replay_buffer.rules.transitions import (
    GroupsDropped,
    PolicyAdvanced,
    RunOpened,
    ServerDrained,
    StepsCommitted,
    Transition,
)

ENDS: Final = (GroupsDropped, PolicyAdvanced, RunOpened, ServerDrained, StepsCommitted)
"""Transitions that `endings` has something to say about."""


class Ending(NamedTuple):
    """A training group that ended."""

    fate: str  # consumed, or the reason it was dropped for
    written_bytes: int  # of its newest attempts, in the log


@dataclass(frozen=True, slots=True)
class Observer:
    """Who is told what happened, for metrics."""

    run_opened: Callable[[RunState, Leases, Fleet], None] = lambda _state, _leases, _fleet: None
    drains_changed: Callable[[RunState], None] = lambda _state: None
    ticket_issued: Callable[[str, Purpose, str, int], None] = lambda _run, _purpose, _server, _attempt: None
    tickets_waited: Callable[[str, float], None] = lambda _run, _seconds: None
    items_written: Callable[[str, str, Sequence[WriteItem], Sequence[WriteResult]], None] = (
        lambda _run, _server, _items, _results: None
    )
    groups_ended: Callable[[str, Iterable[Ending]], None] = lambda _run, _endings: None
    draw_waited: Callable[[str, float], None] = lambda _run, _seconds: None
    refused: Callable[[str], None] = lambda _cause: None


def endings(run: RunState, transition: Transition) -> Iterator[Ending]:
    """The training groups that a transition is about to end. Those that end otherwise (run_end) are not listed."""
    match transition:
        case GroupsDropped(group_ids=group_ids, reason=reason):
            fate = reason.name.lower()
        case PolicyAdvanced(stale_group_ids=group_ids):
            fate = DropReason.STALE.name.lower()
        case ServerDrained(group_ids=group_ids):
            fate = DropReason.DIVERGED.name.lower()
        case StepsCommitted(step=step) | RunOpened(checkpoint=step):
            last = step if isinstance(step, int) else step.step
            steps = range(run.committed_step + 1, last + 1)
            group_ids = [group_id for at in steps if at in run.batches for group_id in run.batches[at].group_ids]
            fate = "consumed"
        case _:
            return
    for group_id in group_ids:
        group = run.live.get(group_id)
        if group is not None:
            written = sum(location.size_bytes for member in group.members for location in member.records)
            yield Ending(fate, written)
