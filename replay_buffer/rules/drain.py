"""Draining: a server that gets no more tickets, until an operator readmits it.

    DrainServer ──> may it be? ──> ServerDrained, durable ──> no new tickets
                        │              ├── diverging: what it wrote of groups that no step has drawn is dropped, and
                        │              │   their tasks come again; its tickets go to others
                        │              ├── slow: its tickets go to others
                        │              └── by an operator: it finishes the tickets that it holds
                        └── the only active server: refused unless forced

A group that a step has drawn stays: its batch is stable, and the loss bounds what one batch can do.
"""

from __future__ import annotations

from collections.abc import Collection

from leeway.errors import InvalidDataError, PreconditionError
from leeway.types import DrainReason, GroupState
from replay_buffer.rules.groups import Group
from replay_buffer.rules.lifecycle import check_epoch, check_live
from replay_buffer.rules.state import RunState
from replay_buffer.rules.transitions import ServerDrained, ServerReadmitted

_MOST_LETTERS = 1000
"""Of a message; the log keeps it for ever."""
_MOST_DRAINED = 1000


def decide_drain(
    run: RunState,
    server_id: str,
    reason: DrainReason,
    message: str,
    *,
    epoch: int,
    others_active: Collection[str],
    force: bool = False,
) -> ServerDrained | None:
    """Take a server out; None when it is out already.

    Args:
        run: as it is now.
        server_id: the server.
        reason: why it is drained.
        message: the reason in words.
        epoch: of the learner that drains it; 0 for an operator.
        others_active: servers that are present and not drained, besides this one.
        force: drain it although no other is active.

    Raises:
        FencedError: a newer learner has taken over.
        PreconditionError: the run has finished, no other server is active, or very many are drained.
        InvalidDataError: no server is named.
    """
    if epoch:
        check_epoch(run, epoch)
    check_live(run)
    if not server_id:
        raise InvalidDataError(f"run {run.spec.run!r}: name the server that is to be drained")
    if server_id in run.drained:
        return None
    if len(run.drained) >= _MOST_DRAINED:
        raise PreconditionError(f"run {run.spec.run!r}: {len(run.drained)} servers are drained; readmit some first")
    if not others_active and not force:
        raise PreconditionError(
            f"run {run.spec.run!r}: server {server_id!r} is the only active one and stays in the run ({message}); "
            "start another one first, or force it"
        )
    written = [group.group_id for group in run.live.values() if _may_go(group) and _has_part(group, server_id)]
    group_ids = tuple(written) if reason is DrainReason.DIVERGING else ()
    return ServerDrained(server_id, reason, message[:_MOST_LETTERS], group_ids)


def decide_readmit(run: RunState, server_id: str) -> ServerReadmitted | None:
    """Give a drained server tickets again; None when it is not drained.

    Raises:
        PreconditionError: the run has finished.
    """
    check_live(run)
    return ServerReadmitted(server_id) if server_id in run.drained else None


def _may_go(group: Group) -> bool:
    return group.state in (GroupState.OPEN, GroupState.READY)


def _has_part(group: Group, server_id: str) -> bool:
    return group.server_id == server_id or any(member.server_id == server_id for member in group.members)
