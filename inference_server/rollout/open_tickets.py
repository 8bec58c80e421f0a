"""The tickets that this server holds: which of their trajectories are still open, and the renewal of their leases."""

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
from leeway.types import Int32Array, Purpose, Ticket, WriteResult

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class OpenRollout:
    """A trajectory in progress: what is recorded of it, and the asyncio task that samples it."""

    recorder: TrajectoryRecorder
    task: asyncio.Task[None] | None = None


@dataclass(slots=True, eq=False)
class OpenTicket:
    """A ticket with its task and prompt, and those of its rollouts that are still open, by trajectory id."""

    ticket: Ticket
    task: Task
    where: str  # names the task in messages
    prompt: Int32Array
    rollouts: dict[str, OpenRollout] = field(default_factory=dict[str, OpenRollout])

    def cancel(self) -> None:
        """Stop all of its rollouts."""
        for rollout in self.rollouts.values():
            if rollout.task is not None:
                rollout.task.cancel()


def open_ticket(ticket: Ticket, tasks: TaskSet, tokenizer: Tokenizer) -> OpenTicket:
    """Look up the task of a ticket and encode its prompt; both are empty if this server has no such task."""
    train = ticket.purpose is Purpose.TRAIN
    known: Sequence[Task] = tasks.train if train else tasks.heldout
    where = f"{'training' if train else 'held-out'} task {ticket.task_index}"
    if ticket.task_index >= len(known):
        return OpenTicket(ticket, {}, where, np.zeros(0, dtype=np.int32))
    task = known[ticket.task_index]
    return OpenTicket(ticket, task, where, prompt_token_ids(tokenizer, task))


class OpenTickets:
    """All open tickets of this server, found by ticket or by trajectory."""

    def __init__(self) -> None:
        self._by_ticket: dict[tuple[str, int], OpenTicket] = {}  # by group and attempt
        self._by_trajectory: dict[str, OpenTicket] = {}
        self._added = asyncio.Event()

    def __len__(self) -> int:
        """Rollouts that are open."""
        return len(self._by_trajectory)

    def __iter__(self) -> Iterator[OpenTicket]:
        return iter(self._by_ticket.values())

    def of(self, trajectory_id: str) -> OpenTicket | None:
        """The ticket of an open rollout."""
        return self._by_trajectory.get(trajectory_id)

    def add(self, held: OpenTicket) -> None:
        """Hold a ticket, with its open rollouts."""
        self._by_ticket[held.ticket.group_id, held.ticket.attempt] = held
        self._by_trajectory.update(dict.fromkeys(held.rollouts, held))
        self._added.set()

    def end_rollout(self, held: OpenTicket, trajectory_id: str) -> None:
        """Drop a rollout; with its last one the ticket is dropped, too."""
        held.rollouts.pop(trajectory_id, None)
        if self._by_trajectory.get(trajectory_id) is held:
            del self._by_trajectory[trajectory_id]
        if not held.rollouts:
            self._by_ticket.pop((held.ticket.group_id, held.ticket.attempt), None)

    async def keep_leases(self, client: ReplayClient, server_id: str, abort: Callable[[OpenTicket], None]) -> None:
        """Renew the leases of all open tickets until cancelled; accepted writes renew them, too.

        Renewal keeps a ticket while the engine queues its rollouts or a reward takes long.

        Args:
            client: the replay buffer.
            server_id: this server.
            abort: called with each ticket that the buffer has taken back.
        """
        while True:
            if not self._by_ticket:
                self._added.clear()
                await self._added.wait()
                continue
            await asyncio.sleep(min(held.ticket.lease_seconds for held in self) / 3)
            if not self._by_ticket:
                continue
            try:
                aborted = await client.renew_leases(server_id, list(self._by_ticket))
            except (UnavailableError, DeadlineError, ExhaustedError) as error:
                log.warning("leases are not renewed: %s", error.message)
                continue
            for key in aborted:
                if (held := self._by_ticket.get(key)) is not None:
                    log.info("the ticket of group %s was taken back from this server", held.ticket.group_id)
                    abort(held)


class RefusedAttempts:
    """The attempts that the buffer refused most recently, so that each is acted upon once.

    An attempt can be refused again only by what was written of it before its first refusal arrived, and by the failure
    that ends it. A capacity of twice the writer's window therefore never forgets an attempt too early.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._attempts: dict[tuple[str, int], None] = {}  # (trajectory id, attempt), most recently refused last

    def __len__(self) -> int:
        return len(self._attempts)

    def add(self, result: WriteResult) -> bool:
        """Remember a refusal; returns whether it is the first of its attempt."""
        key = (result.trajectory_id, result.attempt)
        first = key not in self._attempts
        self._attempts.pop(key, None)
        self._attempts[key] = None
        if len(self._attempts) > self._capacity:
            del self._attempts[next(iter(self._attempts))]
        return first
