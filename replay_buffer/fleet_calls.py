"""A run's servers: who is there, who leaves, who is taken out and let in again.

who measures    the buffer how long loans take; the learner how far log-probs are from its own (learner/fleet/watch.py)
who decides     the learner, after a step or in its own time, or a person (`leeway fleet`)
who acts        the buffer: no tickets, loans taken back, groups dropped, all in one durable record
who is told     the server, by the answer to its request for work, which a drain ends at once
who unblocks    ReadmitServer, also for a server that was started again meanwhile
"""

from __future__ import annotations

import logging
import statistics

from leeway.types import Drain, DrainReason, GroupState, ServerStatus
from replay_buffer.rules.drain import decide_drain, decide_readmit
from replay_buffer.run_store import Recorder, Run, open_groups

log = logging.getLogger(__name__)


class FleetCalls(Recorder):
    """Leaving, draining, readmitting, listing."""

    async def leave_run(self, name: str, server_id: str) -> None:
        """A server goes: others may have what it holds. Raises NotFoundError: no such run."""
        run = self._run(name)
        run.fleet.left(server_id)
        self._take_loans_back(run, server_id)
        await self.intake.settled()

    async def drain_server(
        self, name: str, server_id: str, reason: DrainReason, message: str, *, epoch: int = 0, force: bool = False
    ) -> tuple[Drain, int]:
        """Take a server out; returns the drain that stands and how many groups this call dropped.

        Raises:
            FencedError, PreconditionError: see ReplayService.DrainServer.
        """
        run = self._run(name)
        others = run.fleet.present(self._now()) - {server_id} - set(run.state.drained)
        drained = decide_drain(run.state, server_id, reason, message, epoch=epoch, others_at_work=others, force=force)
        if drained is not None:
            self._record(name, drained)
            if reason is not DrainReason.OPERATOR:
                self._take_loans_back(run, server_id)
            log.warning(
                "run %s: server %s is drained (%s): %s; %d groups are dropped",
                *(name, server_id, reason.name.lower(), message, len(drained.group_ids)),
            )
        drain = run.state.drained[server_id]
        await self.intake.settled()
        return drain, 0 if drained is None else len(drained.group_ids)

    async def readmit_server(self, name: str, server_id: str) -> bool:
        """Let a server work again; returns whether this call changed anything. Raises: see ReplayService."""
        run = self._run(name)
        readmitted = decide_readmit(run.state, server_id)
        if readmitted is not None:
            log.warning("run %s: server %s is readmitted", name, server_id)
        await self._decided(name, readmitted)
        return readmitted is not None

    async def servers(self, name: str) -> list[ServerStatus]:
        """Those heard of since the start, and those that are drained. Raises NotFoundError: no such run."""
        run = self._run(name)
        statuses = _statuses(run, self._now())
        await self.intake.settled()
        return statuses

    def drain_of(self, name: str, server_id: str) -> Drain | None:
        """Why a server gets no tickets; None when it does. Raises NotFoundError: no such run."""
        return self._run(name).state.drained.get(server_id)

    def _take_loans_back(self, run: Run, server_id: str) -> None:
        """What a server holds may be lent to others now."""
        held = [group.group_id for group in open_groups(run.state) if group.server_id == server_id]
        if held:
            run.leases.expire(held)
            self._drop_expired(run)


def _statuses(run: Run, now: float) -> list[ServerStatus]:
    fleet, drained = run.fleet, run.state.drained
    present = fleet.present(now)
    held = [group.server_id for group in open_groups(run.state) if group.state is GroupState.OPEN and group.at_work]
    ages = fleet.open_loans(run.state.groups.unended, now)
    statuses: list[ServerStatus] = []
    for server_id in sorted({*fleet.members, *drained}):
        member, still_out = fleet.members.get(server_id), ages.get(server_id, [])
        timed = [*(member.loan_seconds if member else ()), *still_out]
        statuses.append(
            ServerStatus(
                server_id=server_id,
                present=server_id in present,
                drained=drained.get(server_id),
                version=None if member is None else member.version,
                loans=held.count(server_id),
                oldest_loan_seconds=max(still_out, default=0.0),
                timed_loans=len(timed),
                median_loan_seconds=statistics.median(timed) if timed else 0.0,
            )
        )
    return statuses
