"""Random histories against an oracle that knows only the definitions of the protocol."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from leeway.errors import FencedError
from leeway.types import GroupState, PolicyVersion, Purpose, Ticket, TrajectoryFailure, WriteItem, WriteStatus
from leeway.v1.storage_pb2 import RunSnapshot
from replay_buffer.rules.lifecycle import check_epoch, decide_finish
from replay_buffer.rules.tickets import decide_expired
from replay_buffer.storage.stored_state import run_from_proto, run_to_proto
from tests.harness.replay_builders import Machine, described, filled, spec

MEMBERS = 2
TOTAL_STEPS = 8


class Histories(RuleBasedStateMachine):
    """Workers, learners and crashes in any order."""

    @initialize(bound=st.integers(0, 3), groups_per_step=st.integers(1, 3))
    def open(self, bound: int, groups_per_step: int) -> None:
        self.machine = Machine(
            spec(
                max_staleness=bound,
                groups_per_step=groups_per_step,
                members=MEMBERS,
                total_steps=TOTAL_STEPS,
                max_attempts=2,
                train_task_count=5,
            )
        )
        self.parents: dict[PolicyVersion, PolicyVersion | None] = {self.machine.spec.root: None}
        self.tickets: dict[str, Ticket] = {}
        self.tokens: dict[str, list[PolicyVersion]] = {}  # of completed groups
        self.acknowledged: dict[str, PolicyVersion] = {}
        self.trained: dict[int, tuple[str, ...]] = {}  # the surviving history
        self.epoch = 1

    # The oracle's own account

    def ancestry(self, known: PolicyVersion | None) -> list[PolicyVersion]:
        line: list[PolicyVersion] = []
        while known is not None:
            line.append(known)
            known = self.parents[known]
        return line

    def common_step(self, known: PolicyVersion) -> int:
        of_head = set(self.ancestry(self.machine.state.head))
        return next(ancestor.step for ancestor in self.ancestry(known) if ancestor in of_head)

    def deadline(self, group_id: str) -> int:
        tokens = self.tokens.get(group_id, [self.acknowledged[group_id]])
        return self.machine.spec.max_staleness + min(self.common_step(known) for known in tokens)

    def fits(self, known: PolicyVersion) -> bool:
        head, bound = self.machine.state.head, self.machine.spec.max_staleness
        return known == head if bound == 0 else head.step - self.common_step(known) <= bound

    def some_version(self, data: st.DataObject) -> PolicyVersion:
        return data.draw(st.sampled_from(list(self.parents)))

    # What happens

    @rule(data=st.data(), max_members=st.integers(1, 12), lapsed=st.booleans())
    def acquire(self, data: st.DataObject, max_members: int, lapsed: bool) -> None:
        server_version = self.some_version(data)
        state = self.machine.state
        before = {group.group_id for group in state.groups.values()}
        tickets = self.machine.acquire(server_version, max_members, expired=lambda _: lapsed)
        assert sum(len(ticket.members) for ticket in tickets) <= max_members
        for ticket in tickets:
            self.tickets[ticket.group_id] = ticket
            self.acknowledged[ticket.group_id] = server_version
            assert self.fits(server_version)
        if any(ticket.group_id not in before for ticket in tickets):
            self.check_admission()

    def check_admission(self) -> None:
        state, run_spec = self.machine.state, self.machine.spec
        live = [
            group.group_id
            for group in state.groups.values()
            if group.state in (GroupState.OPEN, GroupState.READY)
            or (group.state is GroupState.DRAWN and group.step > state.head.step)
        ]
        deadlines = [self.deadline(group_id) for group_id in live]
        head = state.head.step
        for k in range(head, head + run_spec.max_staleness + 1):
            assert sum(due <= k for due in deadlines) <= (k - head + 1) * run_spec.groups_per_step
        assert len(live) <= (run_spec.total_steps - head) * run_spec.groups_per_step

    @precondition(lambda self: self.tickets)
    @rule(data=st.data(), versions=st.integers(1, 2))
    def complete(self, data: st.DataObject, versions: int) -> None:
        ticket = self.tickets.pop(data.draw(st.sampled_from(sorted(self.tickets))))
        tokens = [self.some_version(data) for _ in range(versions)]
        group = self.machine.state.groups[ticket.group_id]
        results = self.machine.write(*filled(ticket, tokens))
        statuses = {result.status for result in results}
        if group.state is GroupState.DROPPED and WriteStatus.ABORTED in statuses:
            return
        assert statuses == {WriteStatus.ACKNOWLEDGED}
        self.tokens.setdefault(ticket.group_id, []).extend(tokens)

    @precondition(lambda self: self.tickets)
    @rule(data=st.data(), retryable=st.booleans())
    def fail_a_member(self, data: st.DataObject, retryable: bool) -> None:
        ticket = self.tickets.pop(data.draw(st.sampled_from(sorted(self.tickets))))
        for member in ticket.members:
            failure = TrajectoryFailure("the engine died", retryable)
            self.machine.write(WriteItem(member.trajectory_id, ticket.attempt, 0, failure))

    @rule(lapsed=st.booleans())
    def sweep(self, lapsed: bool) -> None:
        self.machine.record(*decide_expired(self.machine.state, lambda _: lapsed))

    @precondition(lambda self: self.machine.state.head.step < TOTAL_STEPS)
    @rule(seal=st.booleans(), lapsed=st.booleans())
    def draw(self, seal: bool, lapsed: bool) -> None:
        groups = self.machine.draw(lambda _: lapsed)
        if groups is None:
            return
        assert len(set(groups)) == self.machine.spec.groups_per_step
        earlier = {group_id for step in self.trained.values() for group_id in step}
        for group_id in groups:
            assert group_id not in earlier
            assert all(self.fits(known) for known in self.tokens[group_id])
        assert self.machine.draw() == groups
        if seal:
            head = self.machine.state.head
            new = self.machine.advance()
            self.parents[new] = head
            self.trained[new.step] = groups

    @rule()
    def commit(self) -> None:
        self.machine.commit()

    @rule(data=st.data())
    def restart_learner(self, data: st.DataObject) -> None:
        state = self.machine.state
        line = [known for known in self.ancestry(state.head) if known.step >= state.committed_step]
        checkpoint = data.draw(st.sampled_from(line))
        ledger = [(step, self.trained[step]) for step in range(state.committed_step + 1, checkpoint.step + 1)]
        assert self.machine.reopen(checkpoint, ledger) == self.epoch + 1
        with pytest.raises(FencedError):
            check_epoch(state, self.epoch)
        self.epoch += 1
        self.trained = {step: groups for step, groups in self.trained.items() if step <= checkpoint.step}
        assert state.head == checkpoint

    @rule(folds=st.booleans())
    def restart_buffer(self, folds: bool) -> None:
        """From the log's beginning, or from a snapshot of its end."""
        before = described(self.machine.state)
        stored = run_to_proto(self.machine.state).SerializeToString()
        restored = run_from_proto(RunSnapshot.FromString(stored), self.machine.state.ended)
        self.machine.state = self.machine.refolded() if folds else restored
        assert described(self.machine.state) == before

    # What always holds

    @invariant()
    def every_group_is_somewhere(self) -> None:
        if not hasattr(self, "machine"):
            return
        status = self.machine.state.status()
        assert status.issued == status.open + status.ready + status.drawn + status.consumed + sum(
            status.dropped.values()
        )
        groups = self.machine.state.groups.values()
        assert status.issued == sum(group.purpose is Purpose.TRAIN for group in groups)
        states = Counter(group.state for group in groups)
        assert (states[GroupState.OPEN], states[GroupState.READY]) == (status.open, status.ready)
        committed = [group for step in range(1, status.committed_step + 1) for group in self.trained[step]]
        consumed = sorted(group.group_id for group in groups if group.state is GroupState.CONSUMED)
        assert consumed == sorted(committed)

    def teardown(self) -> None:
        if hasattr(self, "machine"):
            self.machine.commit()
            self.machine.record(decide_finish(self.machine.state, self.machine.state.epoch))
            status = self.machine.state.status()
            assert status.open == status.ready == status.drawn == 0


TestHistories = Histories.TestCase
TestHistories.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
