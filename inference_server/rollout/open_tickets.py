"""What a server has on loan: tickets whose members are still open."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from inference_server.rollout.text import Tokenizer, prompt_token_ids
from inference_server.rollout.trajectory_recorder import TrajectoryRecorder
from leeway.errors import DeadlineError, ExhaustedError, UnavailableError
from leeway.replay_client import ReplayClient
from leeway.tasks import Task, TaskSet
from leeway.types import Int32Array, Purpose, Ticket

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Member:
    """A trajectory that is open: its record so far, and the task that works on it."""

    recorder: TrajectoryRecorder
    task: asyncio.Task[None] | None = None


@dataclass(slots=True, eq=False)
class Loan:
    """A ticket with members that are still open, by trajectory id."""

    ticket: Ticket
    task: Task
    where: str  # names the task in messages
    prompt: Int32Array
    members: dict[str, Member] = field(default_factory=dict[str, Member])

    def cancel(self) -> None:
        """Stop working on it."""
        for member in self.members.values():
            if member.task is not None:
                member.task.cancel()


def open_loan(ticket: Ticket, tasks: TaskSet, tokenizer: Tokenizer) -> Loan:
    """What a ticket asks for; without a task or a prompt where this server has none."""
    train = ticket.purpose is Purpose.TRAIN
    known: Sequence[Task] = tasks.train if train else tasks.heldout
    where = f"{'training' if train else 'held-out'} task {ticket.task_index}"
    if ticket.task_index >= len(known):
        return Loan(ticket, {}, where, np.zeros(0, dtype=np.int32))
    task = known[ticket.task_index]
    return Loan(ticket, task, where, prompt_token_ids(tokenizer, task))


class Loans:
    """What is open: by ticket, and by member."""

    def __init__(self) -> None:
        self._by_ticket: dict[tuple[str, int], Loan] = {}
        self._by_member: dict[str, Loan] = {}  # by trajectory id
        self._lent = asyncio.Event()

    def __len__(self) -> int:
        """Members that are open."""
        return len(self._by_member)

    def __iter__(self) -> Iterator[Loan]:
        return iter(self._by_ticket.values())

    def of(self, trajectory_id: str) -> Loan | None:
        """The loan of an open member."""
        return self._by_member.get(trajectory_id)

    def add(self, loan: Loan) -> None:
        """Its members are open from now on."""
        self._by_ticket[loan.ticket.group_id, loan.ticket.attempt] = loan
        self._by_member.update(dict.fromkeys(loan.members, loan))
        self._lent.set()

    def end(self, loan: Loan, trajectory_id: str) -> None:
        """A member is no longer open."""
        loan.members.pop(trajectory_id, None)
        if self._by_member.get(trajectory_id) is loan:
            del self._by_member[trajectory_id]
        if not loan.members:
            self._by_ticket.pop((loan.ticket.group_id, loan.ticket.attempt), None)

    async def keep(self, client: ReplayClient, server_id: str, abort: Callable[[Loan], None]) -> None:
        """Renew leases, also while the engine queues or a reward takes long; accepted writes renew them too.

        Args:
            client: the replay buffer.
            server_id: who holds them.
            abort: told of each loan that no longer stands.
        """
        while True:
            if not self._by_ticket:
                self._lent.clear()
                await self._lent.wait()
                continue
            await asyncio.sleep(min(loan.ticket.lease_seconds for loan in self) / 3)
            if not self._by_ticket:
                continue
            try:
                aborted = await client.renew_leases(server_id, list(self._by_ticket))
            except (UnavailableError, DeadlineError, ExhaustedError) as error:
                log.warning("leases are not renewed: %s", error.message)
                continue
            for key in aborted:
                if (loan := self._by_ticket.get(key)) is not None:
                    log.info("group %s is no longer lent to this server", loan.ticket.group_id)
                    abort(loan)
