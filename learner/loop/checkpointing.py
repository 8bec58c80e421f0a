"""Checkpoints while training goes on.

    begin ── trainer copies, between two steps ──> files, written in a thread ──> durable ──> Commit ──> old ones go

    waits for    the checkpoint before it: only one is written at a time
    unblocks     the buffer, which is told what is consumed only when nothing can need it again

The ledger is what the next checkpoint will hold: which groups each step used whose commit the buffer has not confirmed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Final

from learner.lineage import Branch
from learner.loop.context import Context
from learner.run_artifacts.checkpoint import LedgerStep, PendingCheckpoint
from learner.trainer import FinishSave
from leeway.rpc import cancel_and_wait
from leeway.types import PolicyVersion, TrajectoryGroup

_LAST_CHECKPOINT_SECONDS: Final = 60.0
"""How long a failing learner waits for a checkpoint that is being written."""


class Checkpointing:
    """Makes the heads of one incarnation durable."""

    def __init__(self, context: Context, restored_step: int) -> None:
        self._context = context
        self._step = restored_step  # of the newest checkpoint, durable or being written
        self._ledger: list[LedgerStep] = []
        self._saving: asyncio.Task[None] | None = None

    def trained(self, step: int, groups: Sequence[TrajectoryGroup]) -> None:
        """Enter the groups of a step in the ledger."""
        self._ledger.append((step, tuple(group.group_id for group in groups)))

    async def begin(self, epoch: int, head: PolicyVersion, branches: Sequence[Branch]) -> None:
        """Begin to make the head durable; training may go on while files are written."""
        if self._step == head.step:
            return
        await self.durable()
        began = time.monotonic()
        self._context.journal.sync()
        self._context.receipts.sync()
        pending = self._context.checkpoints.begin(head, self._ledger, branches)
        finish_save = await asyncio.to_thread(self._context.trainer.begin_save, pending.partial)
        self._step = head.step
        self._saving = asyncio.create_task(self._commit(epoch, pending, finish_save, began), name="checkpoint")

    async def durable(self) -> None:
        """Wait for the checkpoint that is being written, if there is one."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            await saving

    async def leave(self) -> None:
        """After an error: let the current checkpoint finish, so that the next incarnation need not repeat its steps."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            await asyncio.wait([saving], timeout=_LAST_CHECKPOINT_SECONDS)
            await cancel_and_wait(saving)

    async def _commit(self, epoch: int, pending: PendingCheckpoint, finish_save: FinishSave, began: float) -> None:
        """Finish the checkpoint's files, then tell the buffer that its groups are consumed."""

        def finish() -> None:
            finish_save()
            self._context.checkpoints.finish(pending)

        await asyncio.to_thread(finish)
        step = pending.version.step
        kept_step = await asyncio.to_thread(self._context.checkpoints.oldest_kept_step)
        await self._context.answered(self._context.buffer.commit(epoch, step, kept_step))
        self._ledger = [entry for entry in self._ledger if entry[0] > step]
        await asyncio.to_thread(self._context.checkpoints.remove_old)
        self._context.metrics.checkpoint_seconds.observe(time.monotonic() - began)
