"""The buffer's service against the law: any order of calls by learners, workers and crashes.

After every rule the log is read back: each record must be one that the protocol allows, each answer the one that the
records account for, and the buffer's own counts those of the law.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from leeway import codec
from leeway.errors import DeadlineError, FencedError, LeewayError, PreconditionError
from leeway.types import Evaluation, SamplingParams, TrajectoryClose, TrajectoryFailure, WriteItem
from leeway.v1 import common_pb2, replay_pb2
from tests.harness import replay_builders as builders
from tests.harness.handler_calls import Harness
from tests.harness.replay_builders import described
from tests.model.law import OPEN, READY, TRAIN, End, Law, Version, name, read_log

RUN = builders.RUN
LEASE_SECONDS = 1000.0
"""No example takes as long: a lease lapses when the clock jumps, and never else."""
SERVERS = ("a", "b")
STRANGER = common_pb2.PolicyVersion(run=RUN, epoch=7, step=1, digest=hashlib.sha256(b"stranger").digest())

ACKNOWLEDGED = replay_pb2.WRITE_STATUS_ACKNOWLEDGED
ABORTED = replay_pb2.WRITE_STATUS_ABORTED
CONFLICT = replay_pb2.WRITE_STATUS_CONFLICT
OUT_OF_RANGE = replay_pb2.WRITE_STATUS_OUT_OF_RANGE
UNKNOWN = replay_pb2.WRITE_STATUS_UNKNOWN
INVALID = replay_pb2.WRITE_STATUS_INVALID

pick = st.integers(0, 1 << 30)


class BufferMachine(RuleBasedStateMachine):
    """See the module's docstring."""

    @initialize(
        bound=st.integers(0, 2),
        groups_per_step=st.integers(1, 3),
        members=st.integers(1, 2),
        filters=st.sampled_from([False, False, False, True]),
    )
    def open(self, bound: int, groups_per_step: int, members: int, filters: bool) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="model-"))
        self.harness = Harness(self.directory, lease_seconds=LEASE_SECONDS, segment_bytes=4096)
        self.spec = codec.spec_to_proto(
            builders.spec(
                groups_per_step=groups_per_step,
                members=members,
                max_staleness=bound,
                total_steps=6,
                max_attempts=3,
                train_task_count=4,
                drop_no_signal=filters and members > 1,
            )
        )
        self.law = Law(self.spec)
        self.taken = 0
        self.written: dict[tuple[str, int], list[WriteItem]] = {}
        self.servers: dict[str, common_pb2.PolicyVersion] = dict.fromkeys(SERVERS, self.spec.root)
        self.evaluated = 0
        self.opened: list[replay_pb2.OpenRunRequest] = []
        self.open_at(self.spec.root, [])

    def teardown(self) -> None:
        if hasattr(self, "harness"):
            self.harness.close()
            self.harness.loop.close()
            shutil.rmtree(self.directory)

    # Calls

    def call(self, method: str, request: Any, remaining: float | None = 0.0) -> Any:
        try:
            return self.harness.call(method, request, remaining)
        finally:
            self.judge()

    def refused(self, error: type[LeewayError], method: str, request: Any) -> None:
        before = self.taken
        with pytest.raises(error):
            self.call(method, request)
        assert self.taken == before, f"{method} was refused, but changed something"

    def judge(self) -> None:
        """Take over what has become durable."""
        records = list(read_log(self.directory))
        for record in records[self.taken :]:
            self.law.take(record)
        assert not self.law.violations
        self.taken = len(records)

    # The learner

    def open_at(self, checkpoint: common_pb2.PolicyVersion, ledger: Sequence[replay_pb2.LedgerStep]) -> None:
        request = replay_pb2.OpenRunRequest(spec=self.spec, checkpoint=checkpoint, ledger=ledger)
        version, law = name(checkpoint), self.law
        if self.taken and law.given_up:
            self.refused(PreconditionError, "OpenRun", request)
            return
        if self.taken and law.finished:
            assert self.call("OpenRun", request).finished
            return
        surviving = {*law.ancestry(law.head)}
        steps = {entry.step: list(entry.group_ids) for entry in ledger}
        legal = (
            version in surviving
            and law.must_open_at in (None, version)
            and version[2] >= law.committed
            and all(step in steps for step in range(law.committed + 1, version[2] + 1))
            and all(step <= version[2] and law.batches.get(step) == ids for step, ids in steps.items())
        )
        if not legal:
            self.refused(PreconditionError, "OpenRun", request)
            return
        epoch = law.epoch
        self.opened.append(request)
        request.incarnation = b"learner %d" % len(self.opened)
        for _ in range(2):  # again, as a learner does who got no answer
            reply = self.call("OpenRun", request)
            assert (reply.epoch, name(reply.head)) == (epoch + 1, version)
            assert law.epoch == epoch + 1

    @precondition(lambda self: len(self.opened) > 1 and not self.law.finished)
    @rule(number=pick)
    def open_late(self, number: int) -> None:
        """A call that opened the run before the newest one did arrives once more."""
        self.refused(FencedError, "OpenRun", self.opened[number % (len(self.opened) - 1)])

    @rule(number=pick, extra=st.integers(0, 3), damaged=st.booleans())
    def reopen(self, number: int, extra: int, damaged: bool) -> None:
        """At any version there ever was, with the ledger of its checkpoint, or one that lacks or adds something."""
        law = self.law
        legal = [version for version in law.ancestry(law.head) if version[2] >= law.committed]
        versions = legal if number % 3 else sorted(law.parents)
        version = versions[number % len(versions)]
        first = max(self.law.committed + 1 - extra, 1)
        ledger = [
            replay_pb2.LedgerStep(step=step, group_ids=self.law.batches[step])
            for step in range(first, version[2] + 1)
            if step in self.law.batches
        ]
        if damaged and ledger:
            del ledger[number % len(ledger)]
        self.open_at(_proto(version), ledger)

    @rule(behind=st.integers(0, 1), offset=st.sampled_from([1, 1, 1, 0, 2]))
    def draw(self, behind: int, offset: int) -> None:
        law = self.law
        request = replay_pb2.DrawBatchRequest(run=RUN, epoch=law.epoch - behind, step=law.step + offset)
        if behind:
            self.refused(FencedError, "DrawBatch", request)
            return
        if law.must_open_at is not None:
            self.refused(PreconditionError, "DrawBatch", request)
            return
        if offset != 1 or law.step + 1 > self.spec.total_steps or law.finished:
            self.refused(PreconditionError, "DrawBatch", request)
            return
        try:
            drawn = _group_ids(self.call("DrawBatch", request))
        except DeadlineError:
            self.judge()
            assert not law.whole(request.step)
            if all(not self._at_work(group_id) for group_id in law.groups):
                ready = [g for g in law.live() if g.state == READY and law.due(g) >= law.step]
                kept = [g for g in law.batches.get(request.step, []) if not law.groups[g].ended]
                wanted = self.spec.groups_per_step - len(kept)
                assert len(ready) < wanted, "groups are ready, but no batch is made"
            return
        assert drawn == law.batches[request.step]
        for rank in range(2):
            request.rank, request.world_size = rank, 2
            assert _group_ids(self.call("DrawBatch", request)) == drawn[rank::2]

    def _at_work(self, group_id: str) -> bool:
        group = self.law.groups[group_id]
        return group.state == OPEN and any(member.end is End.OPEN for member in group.members)

    @rule(behind=st.integers(0, 1), wrong_parent=st.booleans(), number=pick)
    def advance(self, behind: int, wrong_parent: bool, number: int) -> None:
        law = self.law
        step = law.step + 1
        new = _proto((RUN, law.epoch - behind, step, hashlib.sha256(f"{law.epoch} {step} {number}".encode()).digest()))
        parent = STRANGER if wrong_parent and number % 4 == 0 else _proto(law.head)
        request = replay_pb2.AdvanceRequest(run=RUN, epoch=law.epoch - behind, version=new, parent=parent)
        if behind:
            self.refused(FencedError, "Advance", request)
        elif parent is STRANGER or not law.whole(step) or law.finished or law.must_open_at is not None:
            self.refused(PreconditionError, "Advance", request)
        else:
            self.call("Advance", request)
            assert law.head == name(new)
            self.call("Advance", request)  # again, as a caller does who got no answer
            assert law.head == name(new)

    @rule(behind=st.integers(0, 1), step=st.integers(0, 7))
    def commit(self, behind: int, step: int) -> None:
        law = self.law
        request = replay_pb2.CommitRequest(run=RUN, epoch=law.epoch - behind, step=step)
        if behind:
            self.refused(FencedError, "Commit", request)
        elif step > law.step or law.must_open_at is not None or (law.finished and step > law.committed):
            self.refused(PreconditionError, "Commit", request)
        else:
            committed = law.committed
            self.call("Commit", request)
            assert law.committed == max(committed, step)

    @rule(number=pick, behind=st.sampled_from([0, 0, 1]))
    def reject(self, number: int, behind: int) -> None:
        law = self.law
        training = [key for key, group in law.groups.items() if group.purpose == TRAIN]
        if not training or number % 4:
            return
        group_id = training[number % len(training)]
        group = law.groups[group_id]
        request = replay_pb2.RejectGroupRequest(run=RUN, epoch=law.epoch - behind, group_id=group_id, message="no use")
        if behind:
            self.refused(FencedError, "RejectGroup", request)
        elif (
            law.must_open_at is not None
            or group.state == replay_pb2.GROUP_STATE_CONSUMED
            or (group.state == replay_pb2.GROUP_STATE_DRAWN and group.step in law.sealed)
        ):
            self.refused(PreconditionError, "RejectGroup", request)
        else:
            self.call("RejectGroup", request)
            assert group.ended

    @rule(number=pick)
    def evaluate(self, number: int) -> None:
        law = self.law
        if number % 4:
            return
        versions = sorted(law.parents)
        self.evaluated += 1
        evaluation = Evaluation(
            f"e{self.evaluated}", _version(versions[number % len(versions)]), 2, 1, SamplingParams(max_tokens=16)
        )
        request = codec.evaluation_to_proto(evaluation, law.epoch)
        if law.finished or law.must_open_at is not None:
            self.refused(PreconditionError, "CreateEvaluation", request)
            return
        self.call("CreateEvaluation", request)
        self.call("CreateEvaluation", request)

    @rule(number=pick)
    def roll_back(self, number: int) -> None:
        """A person returns the run to any version."""
        law = self.law
        if number % 3:
            return
        versions = sorted(law.parents)
        version = versions[(number // 3) % len(versions)]
        request = replay_pb2.RollbackRunRequest(run=RUN, version=_proto(version))
        if law.finished or (version not in {*law.ancestry(law.head)} and version != law.must_open_at):
            self.refused(PreconditionError, "RollbackRun", request)
            return
        epoch, again = law.epoch, law.must_open_at == version
        reply = self.call("RollbackRun", request)
        assert reply.epoch == law.epoch == epoch + (not again)
        assert law.head == version
        assert self.call("RollbackRun", request).epoch == law.epoch

    @rule(number=pick)
    def queue_again(self, number: int) -> None:
        """A person gives dead letters another chance."""
        law = self.law
        letters = self.call("ListDeadLetters", replay_pb2.ListDeadLettersRequest(run=RUN)).letters
        assert {letter.group_id for letter in letters} == law.dead_letters
        if not letters:
            return
        group_id = letters[number % len(letters)].group_id
        request = replay_pb2.RequeueDeadLettersRequest(run=RUN, group_ids=[group_id])
        if law.finished:
            self.refused(PreconditionError, "RequeueDeadLetters", request)
            return
        assert self.call("RequeueDeadLetters", request).requeued_count == 1
        assert group_id not in law.dead_letters

    @rule(
        server=st.sampled_from(SERVERS),
        reason=st.sampled_from(replay_pb2.DrainReason.values()[1:]),
        number=pick,
        behind=st.sampled_from([None, 0, 0, 1]),
    )
    def drain(self, server: str, reason: int, number: int, behind: int | None) -> None:
        """The learner or a person takes a server out."""
        law = self.law
        if number % 6:
            return
        request = replay_pb2.DrainServerRequest(
            run=RUN,
            server_id=server,
            reason=reason,  # type: ignore[arg-type]
            message="not like the others",
            epoch=0 if behind is None else law.epoch - behind,
            force=bool(number // 6 % 2),
        )
        if behind and request.epoch:
            self.refused(FencedError, "DrainServer", request)
            return
        fit = not law.finished and (behind is None or law.must_open_at is None or not request.epoch)
        before = set(law.drained)
        try:
            reply = self.call("DrainServer", request)
        except PreconditionError:
            # Who is at work is the clock's business; a force only fails where nothing can be decided.
            assert law.drained == before
            assert not (request.force and fit)
            return
        assert law.drained == before | {server}
        assert reply.drain.message == "not like the others"
        assert (server in before) <= (self.call("DrainServer", request).dropped_count == 0)
        listed = self.call("ListServers", replay_pb2.ListServersRequest(run=RUN)).servers
        assert {entry.server_id for entry in listed if entry.HasField("drained")} == law.drained

    @rule(server=st.sampled_from(SERVERS))
    def readmit(self, server: str) -> None:
        law = self.law
        request = replay_pb2.ReadmitServerRequest(run=RUN, server_id=server)
        if law.finished:
            self.refused(PreconditionError, "ReadmitServer", request)
            return
        drained = server in law.drained
        assert self.call("ReadmitServer", request).readmitted == drained
        assert server not in law.drained

    @rule(server=st.sampled_from(SERVERS))
    def leave(self, server: str) -> None:
        self.call("LeaveRun", replay_pb2.LeaveRunRequest(run=RUN, server_id=server))

    @precondition(lambda self: self.law.committed == self.law.step >= 2 and self.law.must_open_at is None)
    @rule(sure=st.integers(0, 3))
    def finish(self, sure: int) -> None:
        if not sure:
            self.call("FinishRun", replay_pb2.FinishRunRequest(run=RUN, epoch=self.law.epoch))
            assert self.law.finished

    @precondition(lambda self: self.law.committed < self.law.step >= 2)
    @rule(sure=st.integers(0, 2), epoch=st.integers(0, 2))
    def give_up(self, sure: int, epoch: int) -> None:
        """A person ends the run, whatever its learner is about."""
        if not sure:
            return
        law = self.law
        request = replay_pb2.FinishRunRequest(run=RUN, epoch=epoch, give_up=True)
        live = 0 if law.finished else sum(not group.ended for group in law.groups.values())
        ended = law.finished
        assert self.call("FinishRun", request).dropped_count == live
        assert law.finished
        assert law.given_up or ended
        assert self.call("FinishRun", request).dropped_count == 0
        # The learner's checkpoint was on its way; another learner starts from it.
        self.commit(0, law.step)
        self.open_at(_proto(law.head), [])

    # Workers

    @rule(server=st.sampled_from(SERVERS), number=pick)
    def update(self, server: str, number: int) -> None:
        """A server gets the newest weights, or any that were ever published."""
        versions = sorted(self.law.parents)
        choice = self.law.head if number % 3 else versions[number % len(versions)]
        self.servers[server] = _proto(choice)

    @rule(server=st.sampled_from(SERVERS), room=st.integers(1, 6), stranger=st.sampled_from([False, False, True]))
    def acquire(self, server: str, room: int, stranger: bool) -> None:
        law, version = self.law, STRANGER if stranger else self.servers[server]
        request = replay_pb2.AcquireTicketsRequest(run=RUN, server_id=server, version=version, max_members=room)
        if stranger and not law.finished:
            self.refused(PreconditionError, "AcquireTickets", request)
            return
        before = {key: group.attempt for key, group in law.groups.items()}
        reply = self.call("AcquireTickets", request)
        tickets = list(reply.tickets)
        assert reply.HasField("drained") == (server in law.drained)
        if server in law.drained:
            assert not tickets
            return
        assert sum(len(ticket.members) for ticket in tickets) <= room
        granted = {key: group.attempt for key, group in law.groups.items() if group.attempt != before.get(key)}
        assert granted == {ticket.group_id: ticket.attempt for ticket in tickets}
        if not tickets and not stranger and not law.finished and room >= max(2, self.spec.members):
            # Nothing to issue again either: then a new group must break the inequality.
            assert not self._admits(name(version)), "a place is free, but no group is issued"

    def _admits(self, version: Version) -> bool:
        law, spec = self.law, self.spec
        due = law.deadline([version])
        deadlines = [*(law.due(group) for group in law.live()), due]
        return (
            due >= law.step
            and all(
                sum(deadline <= k for deadline in deadlines) <= (k - law.step + 1) * spec.groups_per_step
                for k in range(law.step, law.step + spec.max_staleness + 1)
            )
            and len(deadlines) <= (spec.total_steps - law.step) * spec.groups_per_step
        )

    @rule(server=st.sampled_from(SERVERS))
    def join(self, server: str) -> None:
        """A server starts anew; what it held can go to others."""
        spec = builders.spec()
        request = replay_pb2.JoinRunRequest(
            run=RUN,
            server_id=server,
            signature=codec.signature_to_proto(spec.signature),
            dataset_digest=spec.dataset_digest,
        )
        self.call("JoinRun", request)

    @rule(seconds=st.sampled_from([1.0, LEASE_SECONDS + 1]))
    def wait(self, seconds: float) -> None:
        self.harness.pass_time(seconds)
        self.call("GetRunStatus", replay_pb2.GetRunStatusRequest(run=RUN))

    @rule(number=pick, stale=st.integers(0, 2))
    def fill(self, number: int, stale: int) -> None:
        """Complete everything that is missing of a group, with tokens of its server or of an older version."""
        groups = [key for key in self.law.groups if self._at_work(key)]
        if not groups:
            return
        group_id = groups[number % len(groups)]
        group = self.law.groups[group_id]
        versions = sorted(self.law.parents)
        version = group.server_version if stale else versions[number % len(versions)]
        for place in group.missing:
            member = group.members[place]
            if group.ended or member.end is not End.OPEN or member.items:
                continue
            data = builders.chunk([_version(version)])
            reward = float((number + (place if number % 3 else 0)) % 2)
            items = [
                WriteItem(f"{group_id}.{place}", member.attempt, 0, data),
                WriteItem(
                    f"{group_id}.{place}",
                    member.attempt,
                    1,
                    builders.close([data], reward=reward),
                ),
            ]
            self.write(items)

    @rule(server=st.sampled_from(SERVERS), rounds=st.integers(1, 3), current=st.sampled_from([True, True, True, False]))
    def work(self, server: str, rounds: int, current: bool) -> None:
        """What a healthy server does: take tickets, complete them."""
        if current:
            self.servers[server] = _proto(self.law.head)
        for _ in range(rounds):
            self.acquire(server, 6, False)
            for number in range(len(self.law.groups)):
                self.fill(number, 1)

    @rule(batches=st.integers(1, 3), commits=st.booleans())
    def train(self, batches: int, commits: bool) -> None:
        """What a healthy learner does, as long as there is data."""
        for number in range(batches):
            if self.law.finished or self.law.step == self.spec.total_steps:
                return
            if self.law.must_open_at is not None:
                self.open_at(_proto(self.law.must_open_at), [])
            self.draw(0, 1)
            if self.law.whole(self.law.step + 1):
                self.advance(0, False, number)
                for server in SERVERS:
                    self.servers[server] = _proto(self.law.head)
            self.work(SERVERS[number % 2], 1, False)
        if commits:
            self.commit(0, self.law.step)

    @rule(
        number=pick,
        kind=st.sampled_from(["chunk", "repeat", "other", "gap", "close", "fail", "give up", "stranger", "garbage"]),
        attempt_offset=st.sampled_from([0, 0, 0, -1, 1]),
    )
    def write_item(self, number: int, kind: str, attempt_offset: int) -> None:
        if not self.law.groups:
            return
        groups = sorted(self.law.groups)
        group_id = groups[number % len(groups)]
        group = self.law.groups[group_id]
        place = number % len(group.members)
        member = group.members[place]
        attempt, seq = max(member.attempt + attempt_offset, 0), member.items
        before = self.written.get((f"{group_id}.{place}", member.attempt), [])
        chunks = [item.content for item in before if isinstance(item.content, bytes)]
        content: bytes | memoryview | TrajectoryClose | TrajectoryFailure = builders.chunk(
            [_version(group.server_version)], token_id=number % 60
        )
        match kind:
            case "repeat" if before:
                seq, content = before[number % len(before)].seq, before[number % len(before)].content
            case "other" if before:
                seq = before[number % len(before)].seq
                content = builders.chunk([_version(group.server_version)], token_id=63)
            case "gap":
                seq += 1 + number % 3
            case "close":
                content = builders.close(chunks, reward=float(number % 2))
            case "fail" | "give up":
                content = TrajectoryFailure("it failed", retryable=kind == "fail")
            case "stranger":
                content = builders.chunk([codec.version_from_proto(STRANGER)])
            case "garbage":
                content = b"\xff" * (1 + number % 9)
            case _:
                pass
        self.write([WriteItem(f"{group_id}.{place}", attempt, seq, content)])

    def write(self, items: Sequence[WriteItem]) -> None:
        """One message; each answer must be the one that the protocol names."""
        for item in items:
            request = replay_pb2.WriteTrajectoriesRequest(run=RUN, server_id="a", items=[codec.item_to_proto(item)])
            expected = self._expected(item)
            before = self.taken
            (result,) = self.harness.write([request])
            self.judge()
            assert result.status in expected, (result, expected)
            if result.status == OUT_OF_RANGE:
                group_id, _, place = item.trajectory_id.rpartition(".")
                assert result.expected_seq == self.law.groups[group_id].members[int(place)].items
            if result.status not in (ACKNOWLEDGED, CONFLICT):
                assert self.taken == before, "a refused item changed something"
            key = item.trajectory_id, item.attempt
            known = self.written.setdefault(key, [])
            if result.status == ACKNOWLEDGED and item.seq == len(known):
                known.append(item)

    def _expected(self, item: WriteItem) -> set[int]:
        """The statuses that the protocol allows."""
        group_id, _, place = item.trajectory_id.rpartition(".")
        group = self.law.groups[group_id]
        member = group.members[int(place)]
        if item.attempt < member.attempt:
            return {ABORTED}
        if item.attempt > member.attempt:
            return {UNKNOWN}
        if item.seq < member.items:
            written = self.written[item.trajectory_id, item.attempt]
            if item.seq < len(written) and written[item.seq].content == item.content:
                return {ACKNOWLEDGED}
            return {ABORTED} if group.state == replay_pb2.GROUP_STATE_DROPPED else {CONFLICT}
        if group.state == replay_pb2.GROUP_STATE_DROPPED:
            return {ABORTED}
        if item.seq > member.items:
            return {OUT_OF_RANGE}
        if member.end is not End.OPEN:
            return {INVALID}
        if isinstance(item.content, bytes) and item.content.startswith(b"\xff"):
            return {INVALID}
        return {ACKNOWLEDGED}

    # Crashes

    @rule(keep=st.floats(0, 1), number=pick, what=st.sampled_from(["nothing", "write", "acquire", "draw", "advance"]))
    def crash(self, keep: float, number: int, what: str) -> None:
        """The power goes, perhaps in the middle of a call whose records are on their way to the disk."""
        law, harness = self.law, self.harness
        busy = [key for key in law.groups if self._at_work(key)]
        in_flight: Any = None
        if what == "write" and busy:
            group_id = busy[number % len(busy)]
            place = law.groups[group_id].missing[0]
            member = law.groups[group_id].members[place]
            data = builders.chunk([_version(law.groups[group_id].server_version)], token_id=number % 60)
            item = WriteItem(f"{group_id}.{place}", member.attempt, member.items, data)
            request = replay_pb2.WriteTrajectoriesRequest(run=RUN, server_id="a", items=[codec.item_to_proto(item)])
            in_flight = harness.write_in_flight(request)
        elif what == "acquire":
            version = self.servers[SERVERS[0]]
            request = replay_pb2.AcquireTicketsRequest(run=RUN, server_id="a", version=version, max_members=4)
            in_flight = harness.in_flight("AcquireTickets", request)
        elif what == "draw":
            request = replay_pb2.DrawBatchRequest(run=RUN, epoch=law.epoch, step=law.step + 1)
            in_flight = harness.in_flight("DrawBatch", request)
        elif what == "advance":
            new = _proto((RUN, law.epoch, law.step + 1, hashlib.sha256(f"crash {number}".encode()).digest()))
            request = replay_pb2.AdvanceRequest(run=RUN, epoch=law.epoch, version=new, parent=_proto(law.head))
            in_flight = harness.in_flight("Advance", request)
        before = self.taken
        harness.crash(in_flight, keep=keep)
        assert len(list(read_log(self.directory))) >= before, "acknowledged records are gone"
        self.judge()
        self._read_back(busy)

    @rule(from_log=st.booleans())
    def restart(self, from_log: bool) -> None:
        """A clean stop; the next start finds the same state, in what was stored of it or in the whole log."""
        state = self.harness.buffer._store.runs[RUN].state
        before = described(state)
        self.harness.restart(from_log=from_log)
        assert described(self.harness.buffer._store.runs[RUN].state) == before

    def _read_back(self, group_ids: Sequence[str]) -> None:
        """A write that got no answer may have happened; what happened is what the log has."""
        for record in read_log(self.directory):
            if record.WhichOneof("transition") == "chunk_written":
                written = record.chunk_written
                known = self.written.setdefault((written.trajectory_id, written.attempt), [])
                if written.seq == len(known):
                    known.append(WriteItem(written.trajectory_id, written.attempt, written.seq, written.chunk))

    # What always holds

    @invariant()
    def counts_agree(self) -> None:
        if not hasattr(self, "law"):
            return
        status = self.call("GetRunStatus", replay_pb2.GetRunStatusRequest(run=RUN))
        law, counts = self.law, self.law.counts()
        assert (status.epoch, name(status.head), status.committed_step, status.finished) == (
            law.epoch,
            law.head,
            law.committed,
            law.finished,
        )
        assert status.issued == sum(counts.values())
        assert (status.open, status.ready, status.drawn, status.consumed) == tuple(
            counts.get(state, 0) for state in (1, 2, 3, 4)
        )
        assert {drop.reason: drop.count for drop in status.dropped} == law.dropped

    @invariant()
    def fates_agree(self) -> None:
        if not hasattr(self, "law"):
            return
        exported = {
            piece.group.group_id: (piece.group.state, piece.group.drop_reason, piece.group.step)
            for reply in self.call("ExportGroups", replay_pb2.ExportGroupsRequest(run=RUN))
            for piece in reply.pieces
            if piece.WhichOneof("piece") == "group"
        }
        assert exported == {key: (group.state, group.reason, group.step) for key, group in self.law.groups.items()}


def _proto(version: Version) -> common_pb2.PolicyVersion:
    run, epoch, step, digest = version
    return common_pb2.PolicyVersion(run=run, epoch=epoch, step=step, digest=digest)


def _version(version: Version) -> Any:
    return codec.version_from_proto(_proto(version))


def _group_ids(replies: list[replay_pb2.DrawBatchResponse]) -> list[str]:
    pieces = [piece for reply in replies for piece in reply.pieces]
    return [piece.group.group_id for piece in pieces if piece.WhichOneof("piece") == "group"]


BufferMachine.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
test_any_order_of_calls_and_crashes_keeps_the_law = BufferMachine.TestCase
