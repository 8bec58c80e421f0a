"""The judge of a run that has ended: the law of the log, and what the log cannot show.

    the run's whole log ─────────> law: what the buffer did is what the protocol allows (tests/model/law.py)
    export and status ───────────┐
    calls and writes, recorded ──┼> Oracle: what others were told is what the log holds ──> violations, as text
    the learner's files ─────────┘

The law alone judges admission, staleness, fences and states, record by record. The oracle adds the other side of each
message: acknowledgements, tickets and batches as they were received, mu and pi computed again from labels alone, and
what the learner trained on. A call without an answer may or may not have happened, and counts for nothing.

    1 kept        an acknowledged item is exported with the same bytes, unless a later attempt took its place; the
                  buffer never asks for one again; a consumed group is exported as the log has it
    2 once        the steps that survive are those that the log committed, each trained on its batch, in its order;
                  checkpoints and learner name the same groups
    3 balanced    the status and every group's fate are those of the log; nothing is live after the end; every drop has
                  a reason that can occur here; every ticket that was received is in the log
    4 true        every mu is that of its label, and every pi that of the version the step was trained from
    6 in order    an acknowledged seq follows one that was sent before, attempts never decrease
    7 fenced      nothing succeeds with an epoch or attempt below one that had been handed out before
    10 stable     every reply to a draw brings a batch that the log has; one (epoch, step) has one batch
    11 replayed   what is exported of a trained step is, byte for byte, what was drawn; nothing names another run
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path

import numpy as np

from learner.run_artifacts.journal import read_policy_logprobs
from leeway import arithmetic, codec
from leeway.arithmetic import ArithmeticWeights
from leeway.errors import LeewayError
from leeway.trajectory.assembly import assemble_records, assemble_trajectory
from leeway.types import (
    DropReason,
    GroupRecord,
    GroupState,
    PolicyVersion,
    Purpose,
    RunStatus,
    Trajectory,
    TrajectoryRecord,
    VersionSpan,
)
from leeway.v1 import replay_pb2
from leeway.weights.digests import weights_digest
from tests.harness.recording_proxy import Call, Record, Write
from tests.model.law import Law, audit, name, read_log

LEGAL_DROPS = {
    Purpose.TRAIN: {DropReason.STALE, DropReason.LEASE_LOST, DropReason.DEAD_LETTER, DropReason.RUN_END},
    Purpose.EVAL: {DropReason.ROLLED_BACK, DropReason.DEAD_LETTER, DropReason.RUN_END},
}
"""Reasons that crashes alone can bring about; the others blame data or a learner that refused it."""

LEARNER_CALLS = ("DrawBatch", "Advance", "Commit", "RejectGroup", "CreateEvaluation", "FinishRun")


@dataclass(frozen=True)
class Evidence:
    """Everything an oracle looks at."""

    record: Record
    groups: Sequence[GroupRecord]  # the export
    status: RunStatus
    run_directory: Path
    log_directory: Path  # the whole log
    finished: bool = True
    learner_files: bool = True  # whether the learner recorded its log-probs, and kept all of its journal


def violations(evidence: Evidence) -> list[str]:
    """Every violation; each line begins with the number of its invariant."""
    return Oracle(evidence).violations()


@dataclass(frozen=True, slots=True)
class _Draw:
    epoch: int
    step: int
    groups: tuple[GroupRecord, ...]

    @property
    def group_ids(self) -> tuple[str, ...]:
        return tuple(group.group_id for group in self.groups)


class RecordedCalls:
    """The checks that need no more than what passed the proxies."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def forgotten(self) -> Iterator[str]:
        acknowledged: dict[tuple[str, int, int], int] = {}
        for write in self.record.writes:
            if write.acknowledged and write.answered is not None:
                acknowledged[_key(write)] = min(write.answered, acknowledged.get(_key(write), write.answered))
        for write in self.record.writes:
            item, result = write.item, write.result
            if result is None or result.status != replay_pb2.WRITE_STATUS_OUT_OF_RANGE:
                continue
            missing = (item.trajectory_id, item.attempt, result.expected_seq)
            if acknowledged.get(missing, write.sent) < write.sent:
                yield f"{_name(write)} was refused for seq {result.expected_seq}, which had been acknowledged"

    def in_order(self) -> Iterator[str]:
        delivered: dict[tuple[str, int, int], int] = {}  # when an item was first sent
        for write in self.record.writes:
            delivered.setdefault(_key(write), write.sent)
        newest: dict[str, int] = defaultdict(int)
        for write in self.record.writes:  # in the order in which they were sent
            item, result = write.item, write.result
            if result is not None and (result.trajectory_id, result.attempt, result.seq) != _key(write):
                yield f"{_name(write)} was answered as seq {result.seq} of {result.trajectory_id}"
            if not write.acknowledged:
                continue
            before = (item.trajectory_id, item.attempt, item.seq - 1)
            if item.seq and delivered.get(before, write.answered or 0) >= (write.answered or 0):
                yield f"{_name(write)} was acknowledged before item {item.seq - 1} was sent"
            if item.attempt < newest[item.trajectory_id]:
                yield f"{_name(write)} was acknowledged after attempt {newest[item.trajectory_id]}"
            newest[item.trajectory_id] = max(newest[item.trajectory_id], item.attempt)
        received: dict[str, int] = defaultdict(int)
        for _, ticket in self.tickets():
            if ticket.attempt <= received[ticket.group_id]:
                yield f"group {ticket.group_id}: attempt {ticket.attempt} came after {received[ticket.group_id]}"
            received[ticket.group_id] = max(received[ticket.group_id], ticket.attempt)

    def fenced(self) -> Iterator[str]:
        opened = [call for call in self.record.of("OpenRun") if not call.reply.finished]
        fences = [(call.ended or 0, call.reply.epoch) for call in opened]
        for earlier, later in combinations(opened, 2):
            fence, epoch, again = earlier.reply.epoch, later.reply.epoch, later.request == earlier.request
            if (epoch < fence and later.begun > (earlier.ended or 0)) or (epoch == fence and not again):
                yield f"epoch {epoch} was allocated after epoch {fence}"
        for call in self.record.calls:
            if call.method in LEARNER_CALLS and call.succeeded:
                newer = [
                    epoch for handed_out, epoch in fences if handed_out < call.begun and epoch > call.request.epoch
                ]
                if newer:
                    yield f"{call.method} of epoch {call.request.epoch} succeeded after epoch {newer[0]} was handed out"
        attempts: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for call, ticket in self.tickets():
            for member in ticket.members:
                attempts[member.trajectory_id].append((call.ended or 0, ticket.attempt))
        for write in self.record.writes:
            for handed_out, attempt in attempts[write.item.trajectory_id]:
                if write.acknowledged and handed_out < write.sent and attempt > write.item.attempt:
                    yield f"{_name(write)} was acknowledged after attempt {attempt} was handed out"

    def tickets(self) -> Iterator[tuple[Call, replay_pb2.Ticket]]:
        for call in self.record.of("AcquireTickets"):
            for ticket in call.reply.tickets:
                yield call, ticket


class Oracle(RecordedCalls):
    """One method per invariant; each yields its violations."""

    legal_drops = LEGAL_DROPS

    def __init__(self, evidence: Evidence) -> None:
        super().__init__(evidence.record)
        self.evidence = evidence
        self.groups = {group.group_id: group for group in evidence.groups}
        self.trajectories = {
            trajectory.trajectory_id: (group, trajectory)
            for group in evidence.groups
            for trajectory in group.trajectories
        }
        self.spec = codec.spec_from_proto(self.record.of("OpenRun")[0].request.spec)
        law = audit(read_log(evidence.log_directory), self.spec.run)
        self.num_records = law.num_records if law is not None else 0
        self.broken = law.violations if law is not None else ["1: the log does not know the run"]
        self.law: Law | None = None if self.broken else law
        self._whole: dict[str, Trajectory | str] = {}

    def violations(self) -> list[str]:
        """Every violation; of a run that could not finish, what must not be so at any time."""
        checks = {1: self.kept, 4: self.true, 6: self.in_order, 7: self.fenced, 10: self.stable}
        if self.evidence.finished and self.law is not None:
            checks |= {2: self.once, 3: self.balanced, 11: self.replayed}
        found = [f"{number}: {line}" for number, check in sorted(checks.items()) for line in check()]
        return [*(f"{line} (by the log)" for line in self.broken), *found]

    # 1

    def kept(self) -> Iterator[str]:
        for write in self.record.writes:
            if write.acknowledged and (problem := self._lost(write)):
                yield f"{_name(write)} was acknowledged, but {problem}"
        yield from self.forgotten()
        for group in self.groups.values():
            if group.drop_reason is not None and group.drop_reason not in self.legal_drops[group.purpose]:
                yield f"{group.group_id} was dropped as {group.drop_reason.name}: {group.drop_message}"
            if self.law is not None and group.state is GroupState.CONSUMED and group.group_id in self.law.groups:
                logged = [member.chunks for member in self.law.groups[group.group_id].members]
                if [list(trajectory.chunks) for trajectory in group.trajectories] != logged:
                    yield f"{group.group_id} is exported with other chunks than its log has"

    def _lost(self, write: Write) -> str:
        item = write.item
        if item.trajectory_id not in self.trajectories:
            return "its trajectory is not exported"
        trajectory = self.trajectories[item.trajectory_id][1]
        if trajectory.attempt > item.attempt:
            return ""
        if trajectory.attempt < item.attempt:
            return f"attempt {trajectory.attempt} is exported"
        match item.WhichOneof("content"):
            case "chunk":
                if item.seq >= len(trajectory.chunks):
                    return f"{len(trajectory.chunks)} chunks are exported"
                return "" if trajectory.chunks[item.seq] == item.chunk else "other bytes are exported"
            case "close":
                same = trajectory.close == codec.close_from_proto(item.close)
                return "" if same else f"its close is exported as {trajectory.close}"
            case _:
                return "" if trajectory.failure else "no failure is exported"

    # 2

    def once(self) -> Iterator[str]:
        assert self.law is not None
        steps, committed = range(1, self.spec.total_steps + 1), self.evidence.status.committed_step
        if sorted(self.law.batches) != list(steps) or not self.law.committed == committed == self.spec.total_steps:
            yield f"the log committed steps {sorted(self.law.batches)} up to {self.law.committed}, not {committed}"
            return
        history, step_of = 0, dict[str, int]()
        for step in steps:
            batch = self.law.batches[step]
            history = _next_history(history, step, [self.groups[group_id] for group_id in batch])
            manifest, _ = arithmetic.published_weights(history, step)
            if weights_digest(manifest) != self.surviving[step].digest:
                yield f"step {step}: {self.surviving[step]} was not trained from its parent on {batch}"
                return
            for group_id in batch:
                if group_id in step_of:
                    yield f"group {group_id} was trained on in step {step_of[group_id]} and again in step {step}"
                step_of[group_id] = step
                if len(self.groups[group_id].trajectories) != self.spec.members:
                    yield f"step {step}: {len(self.groups[group_id].trajectories)} members of {group_id}"
            if self.evidence.learner_files and self._trained(step) != dict.fromkeys(batch, self.spec.members):
                yield f"step {step}: the log has {batch}, the learner trained {self._trained(step)}"
        yield from self._ledgers()
        if self.evidence.learner_files:
            journal = [json.loads(line) for line in self._file("metrics.jsonl").read_text().splitlines()]
            recorded = [line["step"] for line in journal if line["kind"] == "step"]
            if recorded != list(steps):
                yield f"the journal's steps are {recorded}"

    def _file(self, name: str) -> Path:
        return self.evidence.run_directory / name

    def _trained(self, step: int) -> Mapping[str, int]:
        """Members by group that the learner says it trained on in the surviving history."""
        members: dict[str, int] = defaultdict(int)
        for trajectory_id in read_policy_logprobs(self.evidence.run_directory, step):
            members[trajectory_id.rpartition(".")[0]] += 1
        return members

    def _ledgers(self) -> Iterator[str]:
        """A ledger names what was drawn for the versions that led to its checkpoint, in the order of the draw."""
        assert self.law is not None
        for where, checkpoint, ledger in self._ledger_entries():
            known = checkpoint if checkpoint in self.law.parents else None
            epochs = {version[2]: version[1] for version in self.law.ancestry(known)}
            for step, group_ids in ledger:
                drawn = [draw.group_ids for draw in self.draws if (draw.epoch, draw.step) == (epochs.get(step), step)]
                if group_ids not in drawn:
                    yield f"step {step}: {where} says {group_ids}, drawn were {drawn}"

    def _ledger_entries(
        self,
    ) -> Iterator[tuple[str, tuple[str, int, int, bytes], list[tuple[int, tuple[str, ...]]]]]:
        for call in self.record.of("OpenRun"):
            entries = [(entry.step, tuple(entry.group_ids)) for entry in call.request.ledger]
            yield f"the ledger of epoch {call.reply.epoch}", name(call.request.checkpoint), entries
        for path in sorted(self.evidence.run_directory.glob("checkpoints/step-*/manifest.json")):
            manifest = json.loads(path.read_text())
            version = manifest["run"], manifest["epoch"], manifest["step"], bytes.fromhex(manifest["digest"])
            yield path.parent.name, version, [(step, tuple(group_ids)) for step, group_ids in manifest["ledger"]]

    @cached_property
    def draws(self) -> list[_Draw]:
        """Every batch that a learner received."""
        return [
            _Draw(
                call.request.epoch,
                call.request.step,
                tuple(assemble_records([piece for reply in call.replies for piece in reply.pieces])),
            )
            for call in self.record.of("DrawBatch")
        ]

    @cached_property
    def surviving(self) -> dict[int, PolicyVersion]:
        """step -> version of the history that led to the run's last version."""
        assert self.law is not None
        return {version[2]: PolicyVersion(*version) for version in self.law.ancestry(self.law.head)}

    # 3

    def balanced(self) -> Iterator[str]:
        assert self.law is not None
        status, counts = self.evidence.status, self.law.counts()
        told = status.issued, status.open, status.ready, status.drawn, status.consumed, sum(status.dropped.values())
        logged = (sum(counts.values()), *(counts.get(state, 0) for state in range(1, 6)))
        if told != logged or status.open or status.ready or status.drawn:
            yield f"(issued, open, ready, drawn, consumed, dropped) is {told}, in the log {logged}"
        if not (status.finished and self.law.finished):
            yield f"finished: {status.finished}, in the log {self.law.finished}"
        for group_id in self.groups.keys() ^ self.law.groups.keys():
            yield f"group {group_id} is exported or logged, but not both"
        for group_id, group in self.law.groups.items():
            exported = self.groups.get(group_id)
            if exported is None:
                continue
            if (exported.state, exported.drop_reason or 0, exported.step) != (group.state, group.reason, group.step):
                yield f"group {group_id} is exported as {exported.state.name} for {exported.drop_reason}"
            if not group.ended:
                yield f"{exported.purpose.name} group {group_id} is {exported.state.name}"
        for _, ticket in self.tickets():
            if (ticket.group_id, ticket.attempt) not in self.law.issued:
                yield f"attempt {ticket.attempt} of group {ticket.group_id} was handed out and is not in the log"

    # 4

    def true(self) -> Iterator[str]:
        for group, record in self.trajectories.values():
            if record.close is None:
                continue
            trajectory = self._assembled(record)
            if isinstance(trajectory, str):
                if group.state is GroupState.CONSUMED:
                    yield trajectory
                continue
            for span in trajectory.version_spans:
                at, expected = _first_difference(trajectory, span.version, trajectory.behavior_logprobs, span)
                if at is not None:
                    yield (
                        f"{record.trajectory_id}: token {at} is labelled {span.version}, whose mu is {expected}, "
                        f"not {trajectory.behavior_logprobs[at]}"
                    )
            trained = group.state is GroupState.CONSUMED and group.purpose is Purpose.TRAIN
            if trained and self.evidence.learner_files and self.law is not None:
                yield from self._pi(group, trajectory)

    def _pi(self, group: GroupRecord, trajectory: Trajectory) -> Iterator[str]:
        trained_from = self.surviving.get(group.step - 1)
        logprobs = read_policy_logprobs(self.evidence.run_directory, group.step).get(trajectory.trajectory_id)
        if trained_from is None or logprobs is None:
            yield f"{trajectory.trajectory_id}: it is not known how step {group.step} was trained on it"
            return
        policy = np.zeros(trajectory.num_tokens, dtype=np.float32)
        policy[trajectory.loss_mask] = logprobs
        for span in trajectory.version_spans:
            at, expected = _first_difference(trajectory, trained_from, policy, span)
            if at is not None:
                yield (
                    f"{trajectory.trajectory_id}: step {group.step} was to start from {trained_from}, "
                    f"whose pi of token {at} is {expected}, not {policy[at]}"
                )

    def _assembled(self, record: TrajectoryRecord) -> Trajectory | str:
        if record.trajectory_id not in self._whole:
            try:
                self._whole[record.trajectory_id] = assemble_trajectory(record)
            except LeewayError as error:
                self._whole[record.trajectory_id] = error.message
        return self._whole[record.trajectory_id]

    # 10

    def stable(self) -> Iterator[str]:
        first: dict[tuple[int, int], tuple[str, ...]] = {}
        for draw in self.draws:
            before = first.setdefault((draw.epoch, draw.step), draw.group_ids)
            if before != draw.group_ids:
                yield f"epoch {draw.epoch} drew {before} for step {draw.step}, and later {draw.group_ids}"
            if len(set(draw.group_ids)) != self.spec.groups_per_step:
                yield f"epoch {draw.epoch} drew {draw.group_ids} for step {draw.step}"
            if self.law is not None and (draw.epoch, draw.step, draw.group_ids) not in self.law.drawn:
                yield f"epoch {draw.epoch} drew {draw.group_ids} for step {draw.step}, which is not in the log"

    # 11

    def replayed(self) -> Iterator[str]:
        for draw in self.draws:
            version = self.surviving.get(draw.step)
            for group in draw.groups if version is not None and version.epoch == draw.epoch else ():
                exported = self.groups.get(group.group_id)
                if exported is None or content_of(exported.trajectories) != content_of(group.trajectories):
                    yield f"step {draw.step}: group {group.group_id} is not exported as it was drawn"
        named = {*self.groups, *(group_id for draw in self.draws for group_id in draw.group_ids)}
        for group_id in named:
            if not group_id.startswith(f"{self.spec.run}-"):
                yield f"group {group_id} is exported or drawn for run {self.spec.run}"


def content_of(trajectories: Sequence[TrajectoryRecord]) -> list[object]:
    """What makes two records of a group equal."""
    return [(each.trajectory_id, each.attempt, each.server_id, each.close, each.chunks) for each in trajectories]


def _next_history(history: int, step: int, groups: Sequence[GroupRecord]) -> int:
    """The history that a rehearsal's weights name after a step: a hash over all that was trained on, in order."""
    digest = hashlib.sha256(struct.pack("<QQ", history, step))
    for group in groups:
        rewards = [member.close.reward for member in group.trajectories if member.close is not None]
        digest.update(group.group_id.encode() + b"\0" + struct.pack(f"<{len(rewards)}d", *rewards))
    return int.from_bytes(digest.digest()[:8], "little") >> 1


def _first_difference(
    trajectory: Trajectory, version: PolicyVersion, logprobs: np.ndarray, span: VersionSpan
) -> tuple[int | None, float]:
    """The first token of a span whose log-prob is not the one computed at `version`, and that one."""
    weights, token_ids = ArithmeticWeights.of(version), trajectory.token_ids.tolist()
    temperature = next(
        segment.sampling.temperature
        for segment in trajectory.segments
        if segment.sampling is not None and segment.start_token <= span.start_token < segment.end_token
    )
    for at in range(span.start_token, span.end_token):
        law = arithmetic.next_distribution(weights, at, token_ids[at - 1], temperature).logprob(token_ids[at])
        if logprobs[at] != np.float32(law):
            return at, law
    return None, 0.0


def _key(write: Write) -> tuple[str, int, int]:
    return write.item.trajectory_id, write.item.attempt, write.item.seq


def _name(write: Write) -> str:
    return f"item {write.item.seq} of {write.item.trajectory_id}, attempt {write.item.attempt},"
