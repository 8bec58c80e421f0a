"""The draw condition and the admission inequality over version trees with branches, against their definitions.

The other side of every comparison is written from the definitions alone: parents in a dict, ancestors as lists, and the
inequality summed group by group.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from hypothesis import event, given, settings
from hypothesis import strategies as st

from leeway.types import GroupState, PolicyVersion, Purpose, SamplingParams, Ticket, TicketMember
from replay_buffer.rules.admission import deadline_of, may_serve
from replay_buffer.rules.draw import decide_draw, decide_reject
from replay_buffer.rules.lineage import Lineage
from replay_buffer.rules.transitions import ChunkWritten, TicketIssued, TrajectoryClosed
from tests.harness.replay_builders import Machine, chunk, close, lag, spec, version

MEMBERS = 2
CHECKED = settings(max_examples=300, deadline=None, derandomize=True)


@dataclass
class Tree:
    """Versions and their parents; the head; what explicit rollbacks discarded."""

    parents: dict[PolicyVersion, PolicyVersion | None]
    head: PolicyVersion
    discarded: set[PolicyVersion]

    def line(self, known: PolicyVersion | None) -> list[PolicyVersion]:
        """The version and its ancestors, newest first."""
        line: list[PolicyVersion] = []
        while known is not None:
            line.append(known)
            known = self.parents[known]
        return line

    def common_step(self, known: PolicyVersion) -> int:
        of_head = self.line(self.head)
        return next(ancestor.step for ancestor in self.line(known) if ancestor in of_head)

    def deadline(self, versions: set[PolicyVersion], bound: int) -> int:
        """The last head step at which tokens of these versions may be trained on; -1 for none."""
        if bound == 0:
            return self.head.step if versions == {self.head} else -1
        return min(-1 if known in self.discarded else bound + self.common_step(known) for known in versions)

    def may_train(self, versions: set[PolicyVersion], bound: int) -> bool:
        """The draw condition, token by token."""
        if versions & self.discarded:
            return False
        if bound == 0:
            return all(known == self.head for known in versions)
        return all(self.head.step - self.common_step(known) <= bound for known in versions)


@st.composite
def trees(draw: st.DrawFn) -> tuple[Tree, Lineage]:
    """Trains, restarts from checkpoints (a new branch) and explicit rollbacks (the old branch is discarded)."""
    root = version(0, epoch=0)
    tree, lineage, epoch = Tree({root: None}, root, set()), Lineage(root), 1
    for what in draw(st.lists(st.sampled_from(["train", "train", "train", "restart", "discard"]), max_size=16)):
        if what == "train":
            new = version(tree.head.step + 1, epoch)
            lineage.register(new, tree.head)
            tree.parents[new], tree.head = tree.head, new
            continue
        epoch += 1
        back_to = draw(st.sampled_from(tree.line(tree.head)))
        if what == "restart":
            lineage.rollback(back_to)
        else:
            lineage.discard_after(back_to)
            tree.discarded |= {known for known in tree.parents if tree.common_step(known) > back_to.step}
        tree.head = back_to
    return tree, lineage


@given(tree=trees(), bound=st.integers(0, 3), data=st.data())
@CHECKED
def test_lag_deadline_and_service_are_what_they_are_defined_as(
    tree: tuple[Tree, Lineage], bound: int, data: st.DataObject
) -> None:
    oracle, lineage = tree
    machine = Machine(spec(max_staleness=bound))
    machine.state.lineage = lineage
    versions = set(data.draw(st.lists(st.sampled_from(list(oracle.parents)), min_size=1, max_size=3)))
    for known in versions:
        assert lag(lineage, known) == oracle.head.step - oracle.common_step(known)
        assert may_serve(machine.state, known) == oracle.may_train({known}, bound)
    due = deadline_of(machine.state, versions)
    assert (due >= oracle.head.step) == oracle.may_train(versions, bound)
    assert max(due, -1) == oracle.deadline(versions, bound)
    branched = any(known not in oracle.line(oracle.head) for known in versions)
    fits = due >= oracle.head.step
    event(f"bound {bound}, {'a token of an abandoned branch' if branched else 'one history'}, fits: {fits}")


@dataclass(frozen=True)
class Sampled:
    """A live group: the versions of its tokens (none: what its server had), and whether it is whole."""

    versions: tuple[PolicyVersion, ...]
    asked_at: PolicyVersion
    whole: bool

    @property
    def counted(self) -> set[PolicyVersion]:
        return set(self.versions) or {self.asked_at}


@st.composite
def buffers(draw: st.DrawFn, max_groups: int) -> tuple[Machine, Tree, list[Sampled]]:
    """A run with live groups of any versions of a tree, whatever admission would have said of them."""
    oracle, lineage = draw(trees())
    per_step, bound = draw(st.integers(1, 2)), draw(st.integers(0, 3))
    machine = Machine(
        spec(max_staleness=bound, groups_per_step=per_step, members=MEMBERS, total_steps=oracle.head.step + 5)
    )
    state = machine.state
    state.lineage = lineage
    some = st.one_of(st.just(oracle.head), st.sampled_from(list(oracle.parents)))
    groups: list[Sampled] = []
    for number in range(1, draw(st.integers(0, max_groups)) + 1):
        whole = draw(st.booleans())
        versions = tuple(draw(st.lists(some, min_size=1 if whole else 0, max_size=3, unique=True)))
        group = Sampled(versions, draw(some), whole)
        groups.append(group)
        group_id = f"{state.spec.run}-g{number}"
        members = tuple(TicketMember(f"{group_id}.{index}", index, 0) for index in range(MEMBERS))
        ticket = Ticket(group_id, 1, Purpose.TRAIN, 0, members, SamplingParams(max_tokens=16), 30.0)
        machine.record(TicketIssued(ticket, "s0", group.asked_at, number))
        for member in members if whole else members[:1]:
            if versions:
                data = chunk(versions)
                machine.record(ChunkWritten(member.trajectory_id, 1, 0, data, versions))
                if whole:
                    machine.record(TrajectoryClosed(member.trajectory_id, 1, close([data])))
    return machine, oracle, groups


@given(buffer=buffers(8), lapsed=st.booleans())
@CHECKED
def test_a_draw_takes_what_may_be_trained_on_earliest_deadline_first(
    buffer: tuple[Machine, Tree, list[Sampled]], lapsed: bool
) -> None:
    machine, oracle, groups = buffer
    state, run_spec = machine.state, machine.spec
    bound, per_step = run_spec.max_staleness, run_spec.groups_per_step
    drawn = decide_draw(state, state.epoch, state.head.step + 1, lambda _: lapsed)
    eligible = sorted(
        (oracle.deadline(group.counted, bound), number)
        for number, group in enumerate(groups, start=1)
        if group.whole and oracle.may_train(group.counted, bound)
    )
    working = [] if lapsed else [number for number, group in enumerate(groups, start=1) if not group.whole]
    window_end = min(working, default=len(groups) + 1) + (bound + 1) * per_step
    in_window = [(due, number) for due, number in eligible if not working or number < window_end]
    wanted = in_window[:per_step]

    def overtaken(k: int) -> bool:
        """Whether more that is at work is due by k than the steps after this one can take until k."""
        due = [oracle.deadline(groups[number - 1].counted, bound) for number in working]
        return sum(oracle.head.step <= at <= k for at in due) > (k - oracle.head.step) * per_step

    if len(wanted) < per_step or any(overtaken(k) for k in range(oracle.head.step, wanted[-1][0])):
        assert drawn is None
        event("waits")
        return
    assert drawn is not None
    numbers = [state.groups[group_id].number for group_id in drawn.group_ids]
    assert numbers == [number for _, number in wanted]
    assert len(set(numbers)) == per_step
    for number in numbers:
        assert oracle.may_train(groups[number - 1].counted, bound)
    event(f"draws at bound {bound}")


@given(bound=st.integers(0, 3), per_step=st.integers(1, 3), seed=st.integers(0, 2**32))
@settings(CHECKED, max_examples=150)
def test_while_servers_live_nothing_gets_too_old(bound: int, per_step: int, seed: int) -> None:
    """Rollouts end in any order and servers lag as they like: admission and draw together lose nothing."""
    chance = random.Random(seed)
    machine = Machine(spec(max_staleness=bound, groups_per_step=per_step, members=1, total_steps=8))
    line = [machine.spec.root]
    open_tickets: list[Ticket] = []
    asked_at: dict[str, PolicyVersion] = {}
    while machine.state.head.step < 8:
        at = chance.choice(line[-bound - 1 :])
        new = machine.acquire(at, chance.randint(1, 4))
        open_tickets += new
        asked_at |= {ticket.group_id: at for ticket in new}
        for _ in range(chance.randint(0, 3)):
            if open_tickets:
                ticket = open_tickets.pop(chance.randrange(len(open_tickets)))
                machine.fill([ticket], [asked_at[ticket.group_id]])
        if machine.draw(lambda _: False) is not None:
            line.append(machine.advance())
        elif not new and not open_tickets:  # the last asked too far back: the head gets what there is
            open_tickets += (new := machine.acquire())
            asked_at |= {ticket.group_id: machine.state.head for ticket in new}
            assert open_tickets, "nobody is at work, nobody gets work, and no step can be drawn"
    assert machine.state.dropped == {}


@given(buffer=buffers(4), data=st.data(), max_members=st.integers(1, 40))
@CHECKED
def test_every_issue_satisfies_the_inequality_and_the_next_one_would_not(
    buffer: tuple[Machine, Tree, list[Sampled]], data: st.DataObject, max_members: int
) -> None:
    machine, oracle, groups = buffer
    run_spec = machine.spec
    head, bound = oracle.head.step, run_spec.max_staleness
    asked_at = data.draw(st.sampled_from(list(oracle.parents)))
    due = oracle.deadline({asked_at}, bound)

    def holds(deadlines: list[int]) -> bool:
        enough_steps = all(
            sum(1 for known in deadlines if known <= k) <= (k - head + 1) * run_spec.groups_per_step
            for k in range(head, head + bound + 1)
        )
        return enough_steps and len(deadlines) <= (run_spec.total_steps - head) * run_spec.groups_per_step

    live = [oracle.deadline(group.counted, bound) for group in groups]
    tickets = machine.acquire(asked_at, max_members)
    if not oracle.may_train({asked_at}, bound):
        assert tickets == []
        return
    for count in range(1, len(tickets) + 1):
        assert holds(live + [due] * count)
    room_for_another = max_members - MEMBERS * len(tickets) >= MEMBERS
    if room_for_another:
        assert not holds(live + [due] * (len(tickets) + 1))
    event(
        f"bound {bound}, {'some' if tickets else 'none'} issued, {'by admission' if room_for_another else 'by members'}"
    )


def test_at_bound_zero_a_common_ancestor_is_not_enough() -> None:
    """Tokens of the head's abandoned children have lag 0, since their common ancestor is the head; still off-policy."""
    machine = Machine(spec(max_staleness=0, groups_per_step=1))
    (returned,) = machine.step()
    abandoned = machine.state.head
    machine.reopen(machine.spec.root)
    head = machine.state.head
    assert lag(machine.state.lineage, abandoned) == 0
    assert deadline_of(machine.state, {head}) == head.step
    for versions in ({abandoned}, {abandoned, head}):
        assert deadline_of(machine.state, versions) < head.step
    machine.record(decide_reject(machine.state, machine.state.epoch, returned, "its place is needed"))
    assert machine.acquire(abandoned) == []
    (ticket,) = machine.acquire(head)
    machine.fill([ticket], [abandoned, head])
    assert machine.state.groups[ticket.group_id].state is GroupState.DROPPED
    assert machine.draw() is None
