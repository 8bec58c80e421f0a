"""`python -m benchmarks.length_bias`: which lengths are trained on and which are dropped, by the order of drawing.

Simulated servers and a simulated learner around the replay buffer's own decisions (admission, tickets, draw, advance),
on a virtual clock: exact, and the same on every machine. Lengths are log-normal with a long tail; servers decode at a
fixed rate and take new weights in mid-sequence, so a trajectory is as old as its first token.

    leeway            tickets by the admission inequality, draws by the earliest deadline, waiting within its window
    freshest first    the same tickets; each step takes the READY groups whose data is newest, and waits for nobody
    freshest, full    the same, but every free slot gets work at once, whatever can still be trained on

Printed for each bound S: mean length of what is trained over the mean of what was issued (1 = no bias); the same for
the tokens in the longest tenth of the trajectories; the share of groups and of sampled tokens dropped, and of groups by
quarter of length; how long the learner stood idle, and how many tokens it trained on in a second. Waiting for long
rollouts costs time where S is small beside their length: the last columns say how much. Medians over the seeds.
Takes about a minute of CPU time.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from google.protobuf.timestamp_pb2 import Timestamp

from leeway.codec import timestamp_from_proto
from leeway.types import (
    FinishReason,
    GroupState,
    ModelSignature,
    PolicyVersion,
    RunSpec,
    SamplingParams,
    Ticket,
    TrajectoryClose,
)
from replay_buffer.rules.admission import deadline
from replay_buffer.rules.draw import decide_draw
from replay_buffer.rules.fold import apply
from replay_buffer.rules.groups import Group
from replay_buffer.rules.lifecycle import decide_advance
from replay_buffer.rules.opening import decide_open_run
from replay_buffer.rules.state import RunState
from replay_buffer.rules.tickets import TaskOrder, TicketOffice, TicketRequest
from replay_buffer.rules.transitions import BatchDrawn, ChunkWritten, TicketIssued, TrajectoryClosed, Transition
from replay_buffer.storage.index import Index
from replay_buffer.storage.run_index import RunIndex
from replay_buffer.storage.segments import Location

RUN = "length-bias"
NOWHERE = Location(1, 8, 1).handle
EPOCH_START = timestamp_from_proto(Timestamp())
GROUPS_PER_STEP = 8
MEMBERS = 8
SERVERS = 4
SLOTS = 32
TOKEN_SECONDS = 0.02
STEP_SECONDS = 4.0
MEDIAN_TOKENS = 350
SIGMA = 1.0
MAX_TOKENS = 16_384


def version(step: int) -> PolicyVersion:
    """The version that a step yields."""
    return PolicyVersion(RUN, 1 if step else 0, step, step.to_bytes(32, "little"))


def run_spec(steps: int, max_staleness: int) -> RunSpec:
    """What is simulated."""
    return RunSpec(
        run=RUN,
        groups_per_step=GROUPS_PER_STEP,
        members=MEMBERS,
        max_staleness=max_staleness,
        total_steps=steps,
        seed=0,
        train_task_count=1 << 20,
        sampling=SamplingParams(max_tokens=MAX_TOKENS),
        signature=ModelSignature(bytes(32), bytes(32), 64, 0, 0, 0, MAX_TOKENS),
        dataset_digest=bytes(32),
        root=version(0),
        max_attempts=1,
    )


@dataclass(frozen=True)
class Policy:
    """How work is given out and how a step is drawn."""

    name: str
    admits: bool
    draws: Callable[[RunState], BatchDrawn | None]


def earliest_deadline(run: RunState) -> BatchDrawn | None:
    """As the replay buffer draws."""
    return decide_draw(run, run.epoch, run.head.step + 1, lambda _: False)


def freshest(run: RunState) -> BatchDrawn | None:
    """The newest data of what is whole and fits the bound."""
    ready = [group for group in run.live.values() if group.state is GroupState.READY]
    usable = [group for group in ready if deadline(run, group) >= run.head.step]
    if len(usable) < GROUPS_PER_STEP:
        return None
    usable.sort(key=lambda group: (deadline(run, group), group.number), reverse=True)
    return BatchDrawn(run.epoch, run.head.step + 1, tuple(group.group_id for group in usable[:GROUPS_PER_STEP]))


POLICIES = (
    Policy("leeway", True, earliest_deadline),
    Policy("freshest first", True, freshest),
    Policy("freshest, full", False, freshest),
)


@dataclass
class Outcome:
    """What became of every group that was issued."""

    lengths: dict[str, list[int]] = field(default_factory=dict)  # tokens of each member, had it been let finish
    sampled_tokens: int = 0
    trained_tokens: int = 0
    trained: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    seconds: float = 0.0
    idle_seconds: float = 0.0


class Simulation:
    """One run on a virtual clock."""

    def __init__(self, policy: Policy, max_staleness: int, steps: int, seed: int) -> None:
        self.policy = policy
        self.spec = run_spec(steps, max_staleness)
        self.run = RunState(self.spec, RunIndex(Index(), RUN))
        self.random = random.Random(seed)
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()
        self.free = [SLOTS] * SERVERS
        self.started: dict[str, tuple[str, float, int, int]] = {}  # by trajectory: group, start, tokens, server
        self.outcome = Outcome()
        self.training = False
        self.waiting_since = 0.0
        opened = decide_open_run(None, self.spec, self.spec.root, [])
        assert opened is not None
        self.task_order = TaskOrder(0, self.spec.train_task_count)
        self.apply(opened)

    def simulate(self) -> Outcome:
        self.give_out_work()
        while self.events and self.run.head.step < self.spec.total_steps:
            self.now, _, happen = heapq.heappop(self.events)
            happen()
        self.outcome.seconds = self.now
        return self.outcome

    def apply(self, transition: Transition) -> None:
        apply(self.run, transition, 0, NOWHERE)

    def after(self, seconds: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self.events, (self.now + seconds, next(self.order), happen))

    # Servers

    def give_out_work(self) -> None:
        for server in range(SERVERS):
            if self.free[server] >= MEMBERS:
                for issued in self.tickets(server):
                    self.apply(issued)
                    self.begin(issued.ticket, server)

    def office(self, server: int) -> TicketOffice:
        request = TicketRequest(f"s{server}", self.run.head, SLOTS)
        return TicketOffice(self.run, request, self.task_order, lambda _: False, 30.0)

    def tickets(self, server: int) -> Iterator[TicketIssued]:
        office = self.office(server)
        if self.policy.admits:
            yield from office.issue(self.free[server])
            return
        while self.free[server] >= MEMBERS:
            requeued = next(iter(self.run.requeued), None)
            cursor = self.run.task_cursor
            task = self.task_order.at(cursor) if requeued is None else requeued
            yield self.office(server)._new_group(task, cursor + (requeued is None), None)

    def begin(self, ticket: Ticket, server: int) -> None:
        lengths = [
            min(max(int(self.random.lognormvariate(0.0, SIGMA) * MEDIAN_TOKENS), 1), MAX_TOKENS) for _ in ticket.members
        ]
        self.outcome.lengths[ticket.group_id] = lengths
        self.free[server] -= len(ticket.members)
        for member, num_tokens in zip(ticket.members, lengths, strict=True):
            self.started[member.trajectory_id] = (ticket.group_id, self.now, num_tokens, server)
            self.apply(ChunkWritten(member.trajectory_id, 1, 0, b"", (self.run.head,)))
            self.after(num_tokens * TOKEN_SECONDS, lambda name=member.trajectory_id: self.finish(name))

    def finish(self, trajectory_id: str) -> None:
        if trajectory_id not in self.started:
            return  # its group was dropped meanwhile
        _, _, num_tokens, server = self.started.pop(trajectory_id)
        self.outcome.sampled_tokens += num_tokens
        self.free[server] += 1
        close = TrajectoryClose(1, num_tokens, bytes(32), FinishReason.STOP, 0.0, EPOCH_START, EPOCH_START)
        self.apply(TrajectoryClosed(trajectory_id, 1, close))
        self.draw()
        self.give_out_work()

    def abort(self, group: Group) -> None:
        """A dropped group's servers stop at once."""
        self.outcome.dropped.append(group.group_id)
        for member in group.members:
            if (started := self.started.pop(member.trajectory_id, None)) is not None:
                _, began, num_tokens, server = started
                self.outcome.sampled_tokens += min(int((self.now - began) / TOKEN_SECONDS), num_tokens)
                self.free[server] += 1

    # The learner

    def draw(self) -> None:
        if self.training or (drawn := self.policy.draws(self.run)) is None:
            return
        self.apply(drawn)
        self.training = True
        self.outcome.idle_seconds += self.now - self.waiting_since
        self.after(STEP_SECONDS, lambda: self.advance(drawn.group_ids))

    def advance(self, group_ids: Sequence[str]) -> None:
        head = self.run.head
        advanced = decide_advance(self.run, 1, version(head.step + 1), head)
        assert advanced is not None
        stale = [self.run.live[group_id] for group_id in advanced.stale_group_ids]
        self.apply(advanced)
        for group in stale:
            self.abort(group)
        self.outcome.trained += group_ids
        self.outcome.trained_tokens += sum(sum(self.outcome.lengths[group_id]) for group_id in group_ids)
        self.training, self.waiting_since = False, self.now
        self.draw()
        self.give_out_work()


@dataclass(frozen=True)
class Figures:
    """One simulation in numbers."""

    length_ratio: float  # mean tokens of trained trajectories over the mean of issued ones
    tail_ratio: float  # the same, of the tokens that trajectories in the longest tenth hold
    dropped_groups: float
    dropped_tokens: float
    dropped_by_quarter: tuple[float, ...]  # share dropped of the groups in each quarter of group length
    idle: float
    tokens_per_second: float


def figures(outcome: Outcome) -> Figures:
    """Look back on a simulation."""
    ended = outcome.trained + outcome.dropped
    issued = [num_tokens for group_id in ended for num_tokens in outcome.lengths[group_id]]
    trained = [num_tokens for group_id in outcome.trained for num_tokens in outcome.lengths[group_id]]
    long = sorted(issued)[int(0.9 * len(issued))]

    def tail(lengths: Sequence[int]) -> float:
        return sum(num_tokens for num_tokens in lengths if num_tokens >= long) / sum(lengths)

    by_length = sorted(ended, key=lambda group_id: max(outcome.lengths[group_id]))
    dropped = set(outcome.dropped)
    quarters = [by_length[len(ended) * q // 4 : len(ended) * (q + 1) // 4] for q in range(4)]
    return Figures(
        length_ratio=statistics.fmean(trained) / statistics.fmean(issued),
        tail_ratio=tail(trained) / tail(issued),
        dropped_groups=len(dropped) / len(ended),
        dropped_tokens=1 - outcome.trained_tokens / outcome.sampled_tokens,
        dropped_by_quarter=tuple(
            sum(group_id in dropped for group_id in quarter) / len(quarter) for quarter in quarters
        ),
        idle=outcome.idle_seconds / outcome.seconds,
        tokens_per_second=outcome.trained_tokens / outcome.seconds,
    )


def main() -> int:
    """Simulate, and print a table for each bound; exit code 1 when leeway dropped anything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of a simulation (default 60)")
    parser.add_argument("--seeds", type=int, default=3, help="simulations of each policy (default 3)")
    parser.add_argument("--staleness", type=int, nargs="+", default=[2, 4, 8], help="bounds S (default 2 4 8)")
    arguments = parser.parse_args()
    began = time.process_time()
    print(
        f"{GROUPS_PER_STEP} groups of {MEMBERS} per step, {SERVERS * SLOTS} slots, lengths log-normal (median "
        f"{MEDIAN_TOKENS}, sigma {SIGMA:g}, at most {MAX_TOKENS}), a step takes {STEP_SECONDS:g} s, "
        f"a token {TOKEN_SECONDS:g} s; {arguments.steps} steps, medians of {arguments.seeds} seeds"
    )
    dropped = 0.0
    for max_staleness in arguments.staleness:
        print(
            f"\nS = {max_staleness:<12}trained/issued  of the tail   dropped: groups  tokens      by quarter of length"
            "          idle  tokens/s"
        )
        lines = [_line(policy, max_staleness, arguments.steps, arguments.seeds) for policy in POLICIES]
        ours, theirs = lines[0], lines[1]
        print(
            f"freshest first shortens the mean length by {1 - theirs.length_ratio:.1%} (leeway: "
            f"{1 - ours.length_ratio:.1%}), throws {theirs.dropped_tokens:.1%} of the sampled tokens away (leeway: "
            f"{ours.dropped_tokens:.1%}), and trains on {theirs.tokens_per_second / ours.tokens_per_second:.2f} times "
            "as many tokens a second"
        )
        dropped = max(dropped, ours.dropped_groups)
    print(f"\ntarget, no group dropped with every server alive: {'missed' if dropped else 'kept'}")
    print(f"{time.process_time() - began:.0f} s of CPU time")
    return 1 if dropped else 0


def _line(policy: Policy, max_staleness: int, steps: int, seeds: int) -> Figures:
    runs = [figures(Simulation(policy, max_staleness, steps, seed).simulate()) for seed in range(seeds)]
    quarters = tuple(statistics.median(run.dropped_by_quarter[q] for run in runs) for q in range(4))
    medians = {
        name: statistics.median(getattr(run, name) for run in runs)
        for name in ("length_ratio", "tail_ratio", "dropped_groups", "dropped_tokens", "idle", "tokens_per_second")
    }
    line = Figures(**medians, dropped_by_quarter=quarters)
    print(
        f"{policy.name:16}{line.length_ratio:14.3f}{line.tail_ratio:13.3f}{line.dropped_groups:18.1%}"
        f"{line.dropped_tokens:8.1%}   {' '.join(f'{share:6.1%}' for share in quarters)}"
        f"{line.idle:10.1%}{line.tokens_per_second:10.0f}"
    )
    return line


if __name__ == "__main__":
    sys.exit(main())
