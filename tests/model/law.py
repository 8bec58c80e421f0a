"""The delivery protocol (docs/delivery.md) as a law: the judge of a run's history, by the log alone.

    records of one run, in order ──> Law.take ──> violations: "INVARIANT: what the protocol forbids"

It judges every chaos run (tests/chaos), every end-to-end rehearsal (tests/e2e) and every step of the state machine
(test_buffer_machine.py). It shares no decision with the replay buffer: its version tree, its states and its inequality
are its own. It never predicts the next record, but only objects to one. Its numbers are those of chaos/invariants.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Final

from leeway.v1 import common_pb2, log_pb2, replay_pb2, trajectory_pb2

Version = tuple[str, int, int, bytes]
"""(run, epoch, step, digest)"""
PAST: Final = -1

OPEN, READY, DRAWN, CONSUMED, DROPPED = (
    replay_pb2.GROUP_STATE_OPEN,
    replay_pb2.GROUP_STATE_READY,
    replay_pb2.GROUP_STATE_DRAWN,
    replay_pb2.GROUP_STATE_CONSUMED,
    replay_pb2.GROUP_STATE_DROPPED,
)
TRAIN, EVAL = replay_pb2.PURPOSE_TRAIN, replay_pb2.PURPOSE_EVAL
TOO_OLD: Final = {replay_pb2.DROP_REASON_STALE, replay_pb2.DROP_REASON_LEASE_LOST}
REQUEUES: Final = {*TOO_OLD, replay_pb2.DROP_REASON_ROLLED_BACK, replay_pb2.DROP_REASON_DIVERGED}
SET_ASIDE: Final = {
    replay_pb2.DROP_REASON_DEAD_LETTER,
    replay_pb2.DROP_REASON_FAILED,
    replay_pb2.DROP_REASON_INVALID,
    replay_pb2.DROP_REASON_CONFLICT,
    replay_pb2.DROP_REASON_UNKNOWN_VERSION,
}


def name(version: common_pb2.PolicyVersion) -> Version:
    """A version as a key."""
    return version.run, version.epoch, version.step, version.digest


class End(Enum):
    """The state of a member in its newest attempt."""

    OPEN, CLOSED, FAILED = range(3)


@dataclass(slots=True)
class Member:
    """One trajectory."""

    attempt: int = 0
    items: int = 0
    end: End = End.OPEN
    versions: set[Version] = field(default_factory=set[Version])
    server: str = ""
    chunks: list[bytes] = field(default_factory=list[bytes])


@dataclass(slots=True)
class Group:
    """The members of one task."""

    purpose: int
    task: int
    members: list[Member]
    evaluation: str = ""
    state: int = OPEN
    reason: int = 0
    attempt: int = 0
    step: int = 0
    server_version: Version = ("", 0, 0, b"")

    @property
    def ended(self) -> bool:
        return self.state in (CONSUMED, DROPPED)

    @property
    def missing(self) -> list[int]:
        return [place for place, member in enumerate(self.members) if member.end is not End.CLOSED]


class Law:
    """One run, as its records tell it."""

    def __init__(self, spec: replay_pb2.RunSpec) -> None:
        self.spec = spec
        self.epoch = 0
        self.head = name(spec.root)
        self.parents: dict[Version, Version | None] = {self.head: None}
        self.groups: dict[str, Group] = {}
        self.batches: dict[int, list[str]] = {}
        self.sealed: set[int] = set()
        self.evaluations: dict[str, replay_pb2.CreateEvaluationRequest] = {}
        self.committed = 0
        self.finished = False
        self.given_up = False
        self.requeued: Counter[int] = Counter()
        self.dropped: Counter[int] = Counter()
        self.dead_letters: set[str] = set()
        self.discarded: set[Version] = set()
        self.must_open_at: Version | None = None
        self.num_records = 0
        self.violations: list[str] = []
        self.drained: set[str] = set()
        self.issued: set[tuple[str, int]] = set()
        """(group, attempt) of every ticket."""
        self.drawn: set[tuple[int, int, tuple[str, ...]]] = set()
        """(epoch, step, groups) of every batch."""

    # The terms of the protocol

    @property
    def step(self) -> int:
        """h"""
        return self.head[2]

    def lineage_step(self, version: Version) -> int:
        """Step of the newest ancestor, itself included, that the head descends from or is."""
        surviving, at = set(self.ancestry(self.head)), version
        while at not in surviving:
            parent = self.parents[at]
            assert parent is not None
            at = parent
        return at[2]

    def deadline(self, versions: Iterable[Version]) -> int:
        """D: the last head at which tokens of these versions may be drawn."""
        if self.spec.max_staleness == 0:
            return self.step if all(version == self.head for version in versions) else PAST
        return min(
            self.spec.max_staleness + self.lineage_step(version)
            if version in self.parents and version not in self.discarded
            else PAST
            for version in versions
        )

    def due(self, group: Group) -> int:
        """D of a group: by its sampled tokens, and before the first by what its server had acknowledged."""
        return self.deadline(self._sampled(group) or {group.server_version})

    def live(self) -> Iterator[Group]:
        """L: OPEN, READY, or DRAWN in an unsealed batch."""
        for group in self.groups.values():
            if group.purpose == TRAIN and not group.ended and not (group.state == DRAWN and group.step in self.sealed):
                yield group

    def counts(self) -> dict[int, int]:
        """Training groups by state."""
        return dict(Counter(group.state for group in self.groups.values() if group.purpose == TRAIN))

    def whole(self, step: int) -> bool:
        """Whether a step's batch has all of its groups."""
        return step in self.batches and not any(self.groups[group_id].ended for group_id in self.batches[step])

    def ancestry(self, version: Version | None) -> Iterator[Version]:
        """A version, its parent, and so on up to the root."""
        while version is not None:
            yield version
            version = self.parents[version]

    @staticmethod
    def _sampled(group: Group) -> set[Version]:
        return {version for member in group.members for version in member.versions}

    # The records

    def take(self, record: log_pb2.LogRecord) -> None:
        """One record; one that the protocol forbids here is a violation, and is taken over all the same."""
        kind = record.WhichOneof("transition")
        take = getattr(self, f"_take_{kind}", None)
        self.num_records += 1
        if take is not None:
            take(getattr(record, str(kind)))

    def _must(self, condition: bool, number: int, what: str) -> None:
        if not condition:
            self.violations.append(f"{number}: {what}")

    def _take_run_opened(self, opened: log_pb2.RunOpened) -> None:
        checkpoint = name(opened.checkpoint)
        self._must(opened.epoch == self.epoch + 1, 7, f"epoch {opened.epoch} follows {self.epoch}")
        self._must(checkpoint in self.parents, 8, f"the run is opened at {checkpoint}, which was never registered")
        self._must(not self.finished, 3, "a finished run is opened")
        self._must(
            checkpoint in set(self.ancestry(self.head)) and checkpoint[2] >= self.committed,
            2,
            f"the run is opened at {checkpoint}; the head is {self.head}, step {self.committed} is committed",
        )
        self._must(self.must_open_at in (None, checkpoint), 2, f"the run is opened at {checkpoint} after a rollback")
        self.epoch, self.must_open_at = opened.epoch, None
        self._commit(checkpoint[2])
        self._void_batches(checkpoint)

    def _void_batches(self, head: Version) -> None:
        for step in [step for step in self.batches if step > head[2]]:
            for group_id in self.batches.pop(step):
                group = self.groups[group_id]
                if group.state == DRAWN:
                    group.state, group.step = READY, 0
            self.sealed.discard(step)
        self.head = head

    def _take_run_rolled_back(self, rolled_back: log_pb2.RunRolledBack) -> None:
        version, step = name(rolled_back.version), rolled_back.version.step
        self._must(rolled_back.epoch == self.epoch + 1, 7, f"epoch {rolled_back.epoch} follows {self.epoch}")
        self._must(
            not self.finished and version in set(self.ancestry(self.head)), 2, f"{self.head} goes back to {version}"
        )
        left = {known for known in self.parents if self.lineage_step(known) > step}
        trained = {group_id for at, group_ids in self.batches.items() if at > step for group_id in group_ids}
        dropped = set(rolled_back.group_ids)
        for group_id, group in self.groups.items():
            if group_id in dropped:
                self._must(group.state != DROPPED, 3, f"{group_id} is dropped again by a rollback")
            elif group.purpose == TRAIN and group.state != DROPPED:
                kept = group_id not in trained or step + 1 > self.step
                sampled = (self._sampled(group) or {group.server_version}) & left
                gone = not kept and group.step in self.sealed
                self._must(not gone, 2, f"{group_id} was trained on in step {group.step}, and stays after a rollback")
                self._must(group.state == CONSUMED or not sampled, 5, f"{group_id} stays, though sampled by {sampled}")
        self.epoch, self.must_open_at = rolled_back.epoch, version
        self._void_batches(version)
        self.committed = min(self.committed, step)
        self.discarded |= left
        for group_id in rolled_back.group_ids:
            self.groups[group_id].step = 0
            self._drop(self.groups[group_id], replay_pb2.DROP_REASON_ROLLED_BACK, group_id)

    def _take_dead_letters_requeued(self, requeued: log_pb2.DeadLettersRequeued) -> None:
        for group_id in requeued.group_ids:
            self._must(group_id in self.dead_letters, 3, f"{group_id} is queued again, but is no dead letter")
            self.dead_letters.discard(group_id)
            self.requeued[self.groups[group_id].task] += 1

    def _take_ticket_issued(self, issued: log_pb2.TicketIssued) -> None:
        ticket, version = issued.ticket, name(issued.version)
        self._must(not self.finished, 9, f"{ticket.group_id} is issued after the end")
        self._must(
            issued.server_id not in self.drained, 9, f"{ticket.group_id} goes to {issued.server_id}, which is drained"
        )
        self._must(version in self.parents, 9, f"{ticket.group_id} is issued at {version}, which was never registered")
        group = self.groups.get(ticket.group_id)
        if group is None:
            group = self._new_group(ticket, version)
        else:
            self._reissue(ticket, version, group)
        group.attempt, group.server_version = ticket.attempt, version
        self.issued.add((ticket.group_id, ticket.attempt))
        for member in ticket.members:
            group.members[member.member] = Member(ticket.attempt, server=issued.server_id)

    def _new_group(self, ticket: replay_pb2.Ticket, version: Version) -> Group:
        group_id, spec = ticket.group_id, self.spec
        self._must(ticket.attempt == 1, 6, f"{group_id} begins with attempt {ticket.attempt}")
        places = [member.member for member in ticket.members]
        if ticket.purpose == TRAIN:
            wanted = spec.members
            self._must(ticket.task_index < spec.train_task_count, 9, f"{group_id} is of task {ticket.task_index}")
            self._admit(group_id, version)
        else:
            evaluation = self.evaluations[ticket.evaluation_id]
            wanted = evaluation.members
            self._must(
                name(ticket.pinned_version) == name(evaluation.version) == version, 9, f"{group_id} is at {version}"
            )
            others = [other.task for other in self.groups.values() if other.evaluation == ticket.evaluation_id]
            self._must(ticket.task_index not in others, 9, f"task {ticket.task_index} is evaluated twice: {group_id}")
        self._must(places == list(range(wanted)), 9, f"{group_id} has members {places}")
        members = [Member() for _ in places]
        group = Group(ticket.purpose, ticket.task_index, members, ticket.evaluation_id)
        self.groups[group_id] = group
        if ticket.purpose == TRAIN and self.requeued[ticket.task_index]:
            self.requeued[ticket.task_index] -= 1
        return group

    def _admit(self, group_id: str, version: Version) -> None:
        spec, head = self.spec, self.step
        due = self.deadline([version])
        self._must(due >= head, 9, f"{group_id} goes to a server at {version}, the head is {self.head}")
        deadlines = [*(self.due(group) for group in self.live()), due]
        for k in range(head, head + spec.max_staleness + 1):
            early = sum(deadline <= k for deadline in deadlines)
            room = (k - head + 1) * spec.groups_per_step
            self._must(early <= room, 9, f"with {group_id} {early} groups are due until {k}, {room} can be drawn")
        room = (spec.total_steps - head) * spec.groups_per_step
        self._must(len(deadlines) <= room, 9, f"with {group_id} {len(deadlines)} groups are live, {room} can be drawn")

    def _reissue(self, ticket: replay_pb2.Ticket, version: Version, group: Group) -> None:
        group_id = ticket.group_id
        self._must(group.state == OPEN, 9, f"{group_id} is issued again, but it is {group.state}")
        self._must(
            ticket.attempt == group.attempt + 1, 6, f"{group_id}: attempt {ticket.attempt} follows {group.attempt}"
        )
        self._must(ticket.attempt <= self.spec.max_attempts, 9, f"{group_id} is issued for the {ticket.attempt}th time")
        places = [member.member for member in ticket.members]
        self._must(places == group.missing, 9, f"{group_id}: {places} are issued again, {group.missing} are missing")
        if group.purpose == TRAIN:
            closed = {at for member in group.members if member.end is End.CLOSED for at in member.versions}
            due = self.deadline(closed | {version})
            self._must(due >= self.step, 9, f"{group_id} is issued again with D = {due} at head {self.step}")

    def _take_chunk_written(self, written: log_pb2.ChunkWritten) -> None:
        _, member = self._writable(written.trajectory_id, written.attempt)
        self._must(
            written.seq == member.items, 6, f"{written.trajectory_id}: {written.seq} follows {member.items} items"
        )
        member.items += 1
        member.chunks.append(written.chunk)
        spans = trajectory_pb2.TrajectoryChunk.FromString(written.chunk).version_spans
        member.versions |= {name(span.version) for span in spans}

    def _take_trajectory_closed(self, closed: log_pb2.TrajectoryClosed) -> None:
        group, member = self._writable(closed.trajectory_id, closed.attempt)
        self._must(
            closed.close.chunk_count == member.items, 6, f"{closed.trajectory_id} is closed at {member.items} items"
        )
        member.items, member.end = member.items + 1, End.CLOSED
        if not group.missing:
            group.state = READY if group.purpose == TRAIN else CONSUMED

    def _take_trajectory_failed(self, failed: log_pb2.TrajectoryFailed) -> None:
        group, member = self._writable(failed.trajectory_id, failed.attempt, ended=True)
        member.items, member.end = member.items + 1, End.FAILED
        member.versions = set()
        if not failed.failure.retryable and not group.ended:
            self._drop(group, replay_pb2.DROP_REASON_FAILED, failed.trajectory_id.rpartition(".")[0])

    def _writable(self, trajectory_id: str, attempt: int, *, ended: bool = False) -> tuple[Group, Member]:
        group_id, _, place = trajectory_id.rpartition(".")
        self._must(group_id in self.groups, 6, f"{trajectory_id} is written, but was never issued")
        group = self.groups[group_id]
        self._must(int(place) < len(group.members), 6, f"{trajectory_id} is written, but was never issued")
        member = group.members[int(place)]
        self._must(
            attempt == member.attempt,
            7,
            f"{trajectory_id}: attempt {attempt} is written, not {member.attempt}",
        )
        self._must(member.end is End.OPEN, 6, f"{trajectory_id} is written after its end")
        self._must(ended or not group.ended, 3, f"{trajectory_id} is written, but its group is {group.state}")
        return group, member

    def _take_group_dropped(self, dropped: log_pb2.GroupDropped) -> None:
        for group_id in dropped.group_ids:
            group = self.groups[group_id]
            if group.ended:
                continue  # the first durable reason stands
            self._must(
                not (group.state == DRAWN and group.step in self.sealed), 2, f"{group_id} is dropped, but trained on"
            )
            reason = dropped.reason
            if reason in TOO_OLD:
                due = self.due(group)
                self._must(due < self.step, 5, f"{group_id} is dropped as too old, but D = {due} at head {self.step}")
            self._drop(group, reason, group_id)

    def _take_batch_drawn(self, drawn: log_pb2.BatchDrawn) -> None:
        step, group_ids = drawn.step, list(drawn.group_ids)
        self._must(drawn.epoch == self.epoch, 7, f"epoch {drawn.epoch} draws in epoch {self.epoch}")
        self._must(step == self.step + 1 and not self.finished, 10, f"step {step} is drawn at head {self.step}")
        self._must(not self.whole(step), 10, f"step {step} is drawn again")
        size = self.spec.groups_per_step
        self._must(len(set(group_ids)) == len(group_ids) == size, 10, f"step {step} draws {group_ids}")
        for place, group_id in enumerate(group_ids):
            group = self.groups[group_id]
            before = self.batches.get(step, [""] * size)[place]
            kept = before == group_id and group.state == DRAWN
            self._must(
                group.purpose == TRAIN and (kept or group.state == READY), 2, f"step {step}: {group_id} {group.state}"
            )
            self._must(
                kept or not before or self.groups[before].ended, 10, f"step {step}: {group_id} replaces {before}"
            )
            due = self.due(group)
            self._must(due >= self.step, 5, f"step {step} draws {group_id} with D = {due}")
            group.state, group.step = DRAWN, step
        self.batches[step] = group_ids
        self.drawn.add((drawn.epoch, step, tuple(group_ids)))

    def _take_policy_advanced(self, advanced: log_pb2.PolicyAdvanced) -> None:
        version, parent = name(advanced.version), name(advanced.parent)
        self._must(parent == self.head, 2, f"{version} is trained from {parent}, the head is {self.head}")
        self._must(version not in self.parents, 2, f"{version} is registered again")
        run, epoch, step, _ = version
        self._must((run, step) == (self.spec.run, self.step + 1), 2, f"{version} follows {self.head}")
        self._must(epoch == self.epoch, 7, f"{version} is registered in epoch {self.epoch}")
        self._must(self.whole(step), 2, f"{version} is registered, but step {step} has no whole batch")
        self.parents[version] = parent
        self.head = version
        self.sealed.add(step)
        stale = set(advanced.stale_group_ids)
        for group_id, group in self.groups.items():
            if group.purpose != TRAIN or group.ended or group.state == DRAWN:
                self._must(group_id not in stale, 2, f"{group_id} is dropped by {version}, but is {group.state}")
                continue
            due = self.due(group)
            # What a server has left may wait for its lease to end.
            waits = group.state == OPEN and any(member.end is End.OPEN for member in group.members)
            self._must(due < step or group_id not in stale, 5, f"{group_id} is dropped by {version} with D = {due}")
            self._must(due >= step or group_id in stale or waits, 5, f"{group_id} stays at {version} with D = {due}")
        for group_id in stale:
            self._drop(self.groups[group_id], replay_pb2.DROP_REASON_STALE, group_id)

    def _take_steps_committed(self, committed: log_pb2.StepsCommitted) -> None:
        self._must(
            self.committed < committed.step <= self.step, 2, f"step {committed.step} is committed at {self.step}"
        )
        self._commit(committed.step)

    def _commit(self, step: int) -> None:
        for at in range(self.committed + 1, step + 1):
            self._must(at in self.sealed, 2, f"step {at} is committed, but was not trained")
            for group_id in self.batches[at]:
                group = self.groups[group_id]
                self._must(group.state == DRAWN, 2, f"{group_id} of step {at} is consumed, but is {group.state}")
                group.state = CONSUMED
        self.committed = max(step, self.committed)

    def _take_evaluation_created(self, created: log_pb2.EvaluationCreated) -> None:
        request = created.evaluation
        self._must(
            name(request.version) in self.parents, 9, f"{request.evaluation_id} measures an unregistered version"
        )
        for group_id in [key for key, group in self.groups.items() if group.evaluation == request.evaluation_id]:
            self._must(
                self.groups[group_id].ended, 3, f"{request.evaluation_id} is asked for again; {group_id} is live"
            )
            self.groups[group_id].evaluation = f"before {request.evaluation_id}"
        self.evaluations[request.evaluation_id] = request

    def _take_run_finished(self, finished: log_pb2.RunFinished) -> None:
        self._must(not self.finished, 3, "the run ends again")
        whole = finished.given_up or self.committed == self.step
        self._must(whole, 3, f"the run ends with steps {self.committed + 1} to {self.step} open")
        for group_id in finished.group_ids:
            if not self.groups[group_id].ended:
                self._drop(self.groups[group_id], replay_pb2.DROP_REASON_RUN_END, group_id)
        left = [group_id for group_id, group in self.groups.items() if not group.ended]
        self._must(not left, 3, f"the run ends with {left} live")
        self.finished, self.given_up = True, finished.given_up

    def _take_server_drained(self, drained: log_pb2.ServerDrained) -> None:
        server = drained.server_id
        self._must(server not in self.drained and not self.finished, 3, f"{server} is drained again, or after the end")
        self.drained.add(server)
        touched = {
            group_id
            for group_id, group in self.groups.items()
            if group.purpose == TRAIN and group.state in (OPEN, READY) and server in {m.server for m in group.members}
        }
        gone = touched if drained.reason == replay_pb2.DRAIN_REASON_DIVERGING else set[str]()
        self._must(
            set(drained.group_ids) == gone, 3, f"{server} is drained with {drained.group_ids}; it has part in {gone}"
        )
        for group_id in drained.group_ids:
            self._drop(self.groups[group_id], replay_pb2.DROP_REASON_DIVERGED, group_id)

    def _take_server_readmitted(self, readmitted: log_pb2.ServerReadmitted) -> None:
        self._must(
            readmitted.server_id in self.drained, 3, f"{readmitted.server_id} is readmitted, but was not drained"
        )
        self.drained.discard(readmitted.server_id)

    def _drop(self, group: Group, reason: int, group_id: str) -> None:
        group.state, group.reason = DROPPED, reason
        if group.purpose == TRAIN:
            if reason in SET_ASIDE:
                self.dead_letters.add(group_id)
            self.dropped[reason] += 1
            if reason in REQUEUES:
                self.requeued[group.task] += 1


def audit(records: Iterable[log_pb2.LogRecord], run: str) -> Law | None:
    """Every record of one run, as far as they make sense; None when there is none."""
    law: Law | None = None
    for record in records:
        if record.run == run:
            law = law or Law(record.run_opened.spec)
            try:
                law.take(record)
            except (KeyError, IndexError, AssertionError):
                if not law.violations:
                    raise
                return law  # it follows from an earlier violation
    return law


def read_log(directory: Path) -> Iterator[log_pb2.LogRecord]:
    """The records of a whole log, oldest first."""
    return map(log_pb2.LogRecord.FromString, read_frames(directory))


def read_frames(directory: Path) -> Iterator[bytes]:
    """The payloads of a whole log, oldest first, by the frames that log.proto describes."""
    for path in sorted(directory.glob("segment-*.log")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 4], "little")
            yield data[at + 8 : at + 8 + length]
            at += 8 + length
