"""What people and their tools ask of the replay buffer: a look inside, and what only a person may decide."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from leeway.types import (
    DeadLetter,
    PolicyVersion,
    RunStatus,
)
from replay_buffer.live.views import GroupView, view_group
from replay_buffer.rules.dead_letters import decide_requeue, decide_requeue_all, list_dead_letters
from replay_buffer.rules.lifecycle import decide_give_up
from replay_buffer.rules.opening import decide_after_open, decide_rollback
from replay_buffer.run_store import Recorder
from replay_buffer.storage.backup import Backup
from replay_buffer.storage.index_file import Filter
from replay_buffer.storage.selection import check_kept, select

log = logging.getLogger(__name__)


class PeopleCalls(Recorder):
    """Status and listings, rollback, giving a run up, dead letters, backup."""

    async def rollback_run(self, name: str, version: PolicyVersion) -> tuple[int, int]:
        """Return to an older version; returns the raised epoch and how many groups this call dropped.

        Raises:
            PreconditionError: see ReplayService.RollbackRun.
        """
        run = self._run(name)
        rolled_back = decide_rollback(run.state, version)
        if rolled_back is not None:
            self._record(name, rolled_back)
            for drop in decide_after_open(run.state):
                self._record(name, drop)
            log.warning("run %s is rolled back to %s; %d groups are dropped", name, version, len(rolled_back.group_ids))
        epoch = run.state.epoch
        await self.intake.settled()
        return epoch, len(rolled_back.group_ids) if rolled_back is not None else 0

    async def give_up_run(self, name: str) -> int:
        """End a run for good, whoever is at work on it; returns how many groups this call dropped."""
        run = self._run(name)
        finished = decide_give_up(run.state)
        if finished is not None:
            dropped = len(finished.group_ids)
            log.warning("run %s is given up at %s; %d groups are dropped", name, run.state.head, dropped)
        await self._decided(name, finished)
        return 0 if finished is None else len(finished.group_ids)

    async def dead_letters(self, name: str, limit: int) -> list[DeadLetter]:
        """Groups that were set aside, oldest first; a limit keeps the newest. Raises NotFoundError: no such run."""
        letters = list_dead_letters(self._run(name).state, limit)
        await self.intake.settled()
        return letters

    async def requeue_dead_letters(self, name: str, group_ids: Sequence[str]) -> int:
        """Queue tasks again; returns how many this call queued. Raises: see ReplayService.RequeueDeadLetters."""
        state, count = self._run(name).state, 0
        if group_ids:
            requeued = decide_requeue(state, group_ids)
            count = 0 if requeued is None else len(requeued.group_ids)
            await self._decided(name, requeued)
            return count
        while (requeued := decide_requeue_all(state)) is not None:
            count += len(requeued.group_ids)
            await self._decided(name, requeued)
        return count

    async def status(self, name: str) -> RunStatus:
        """Counts and versions. Raises NotFoundError for an unknown run."""
        status = self._run(name).state.status()
        await self.intake.settled()
        return status

    async def export(self, name: str, wanted: Filter, limit: int) -> AsyncIterator[GroupView]:
        """Groups that match, in the order of issue, each as it is when its turn comes; a limit keeps the newest.

        Raises:
            NotFoundError: no such run, or the groups of the step that is asked for have been retired.
        """
        state = self._run(name).state
        check_kept(state, wanted)
        for group_id in select(state, wanted, limit):
            group = state.groups.get(group_id)
            if group is not None:
                seen = view_group(group)
                await self.intake.settled()
                yield seen

    async def back_up(self, directory: Path) -> Backup:
        """Copy everything that is acknowledged, and perhaps more, to a new folder.

        Raises:
            PreconditionError: the folder exists or cannot be written.
        """
        self._check_running()
        await self._log.durable()
        return await self._storage.back_up(directory)
