"""What must hold after a run, whatever died on the way: an account of its own, made from what passed the proxy.

    recorded calls and writes ──┐
    export of the run's log ────┼──> Oracle ──> violations of invariants 1 to 7, as text; none is the only good answer
    learner's files ────────────┘

It shares no code with the replay buffer: versions form its own tree, and mu is recomputed from labels alone. What no
reply was seen for may or may not have happened, and counts for nothing.

    1 kept        an acknowledged item is exported with the same bytes, unless a later attempt took its place; the
                  buffer never asks for one again
    2 once        a group is in at most one surviving step; buffer, checkpoints and learner name the same groups
    3 balanced    issued = consumed + dropped when the run has ended, every drop with a reason that can occur here
    4 true        every mu is the law's at its label, and every pi the law's at the version the step was trained from
    5 fresh       every drawn trajectory keeps the staleness bound against the head it was drawn for
    6 in order    an acknowledged seq follows one that was sent before, attempts never decrease
    7 fenced      nothing succeeds with an epoch or attempt below one that had been handed out before
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from learner.run_artifacts.journal import read_policy_logprobs
from leeway import arithmetic, codec
from leeway.arithmetic import ArithmeticWeights
from leeway.errors import LeewayError
from leeway.trajectory.assembly import assemble_trajectory
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
from tests.harness.recording_proxy import Call, Record, Write

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


def violations(evidence: Evidence) -> list[str]:
    """What does not hold; each line begins with the number of its invariant."""
    return Oracle(evidence).violations()


class Oracle:
    """One method per invariant; each yields its violations."""

    legal_drops = LEGAL_DROPS

    def __init__(self, evidence: Evidence) -> None:
        self.record = evidence.record
        self.groups = {group.group_id: group for group in evidence.groups}
        self.status = evidence.status
        self.directory = evidence.run_directory
        self.trajectories = {
            trajectory.trajectory_id: (group, trajectory)
            for group in evidence.groups
            for trajectory in group.trajectories
        }
        self.spec = codec.spec_from_proto(self.record.of("OpenRun")[0].request.spec)
        self.tree = _VersionTree(self.record, self.spec.root)
        self._whole: dict[str, Trajectory | str] = {}

    def violations(self) -> list[str]:
        """What does not hold; each line begins with the number of its invariant."""
        checks = (self.kept, self.once, self.balanced, self.true, self.fresh, self.in_order, self.fenced)
        return [f"{number}: {line}" for number, check in enumerate(checks, start=1) for line in check()]

    # 1

    def kept(self) -> Iterator[str]:
        for write in self.record.writes:
            if write.acknowledged and (problem := self._lost(write)):
                yield f"{_name(write)} was acknowledged, but {problem}"
        yield from self._forgotten()
        for group in self.groups.values():
            if group.drop_reason is not None and group.drop_reason not in self.legal_drops[group.purpose]:
                yield f"{group.group_id} was dropped as {group.drop_reason.name}: {group.drop_message}"

    def _forgotten(self) -> Iterator[str]:
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
        committed: dict[int, set[str]] = defaultdict(set)
        for group in self.groups.values():
            if group.purpose is Purpose.TRAIN and group.state is GroupState.CONSUMED:
                committed[group.step].add(group.group_id)
        steps = range(1, self.spec.total_steps + 1)
        if sorted(committed) != list(steps) or self.status.committed_step != self.spec.total_steps:
            yield f"the buffer committed steps {sorted(committed)} up to {self.status.committed_step}"
        step_of: dict[str, int] = {}
        for step in steps:
            trained = self._trained(step)
            if committed[step] != set(trained):
                yield f"step {step}: the buffer says {sorted(committed[step])}, the learner trained {sorted(trained)}"
            for group_id, members in trained.items():
                if group_id in step_of:
                    yield f"group {group_id} was trained on in step {step_of[group_id]} and again in step {step}"
                step_of[group_id] = step
                if members != self.spec.members:
                    yield f"step {step}: {members} members of group {group_id} were trained on"
        drawn = {(epoch, step): ids for epoch, step, ids in self._draws()}
        for name, step, group_ids in self._ledger_steps():
            if set(group_ids) != committed[step]:
                yield f"step {step}: the buffer says {sorted(committed[step])}, {name} {sorted(group_ids)}"
            version = self.tree.surviving.get(step)
            if version is not None and drawn.get((version.epoch, step), group_ids) != group_ids:
                yield f"step {step}: {name} orders its groups otherwise than they were drawn"
        journal = [json.loads(line) for line in (self.directory / "metrics.jsonl").read_text().splitlines()]
        recorded = [line["step"] for line in journal if line["kind"] == "step"]
        if recorded != list(steps):
            yield f"the journal's steps are {recorded}"

    def _trained(self, step: int) -> Mapping[str, int]:
        """Members by group that the learner says it trained on in the surviving history."""
        members: dict[str, int] = defaultdict(int)
        for trajectory_id in read_policy_logprobs(self.directory, step):
            members[trajectory_id.rpartition(".")[0]] += 1
        return members

    def _ledger_steps(self) -> Iterator[tuple[str, int, tuple[str, ...]]]:
        """Every (source, step, groups) that a checkpoint of the surviving history claimed."""
        for path in sorted(self.directory.glob("checkpoints/step-*/manifest.json")):
            for step, group_ids in json.loads(path.read_text())["ledger"]:
                yield path.parent.name, step, tuple(group_ids)
        for call in self.record.of("OpenRun"):
            for entry in call.request.ledger:
                yield f"the ledger of epoch {call.reply.epoch}", entry.step, tuple(entry.group_ids)

    def _draws(self) -> Iterator[tuple[int, int, tuple[str, ...]]]:
        for call in self.record.of("DrawBatch"):
            pieces = [piece for reply in call.replies for piece in reply.pieces]
            group_ids = tuple(piece.group.group_id for piece in pieces if piece.WhichOneof("piece") == "group")
            yield call.request.epoch, call.request.step, group_ids

    # 3

    def balanced(self) -> Iterator[str]:
        train = [group for group in self.groups.values() if group.purpose is Purpose.TRAIN]
        status = self.status
        counts = (status.issued, status.consumed, sum(status.dropped.values()))
        ended = [sum(group.state is state for group in train) for state in (GroupState.CONSUMED, GroupState.DROPPED)]
        if counts != (len(train), *ended) or counts[0] != counts[1] + counts[2]:
            yield f"(issued, consumed, dropped) is {counts}; exported are {(len(train), *ended)}"
        if status.open or status.ready or status.drawn or not status.finished:
            yield f"{status.open} open, {status.ready} ready, {status.drawn} drawn, finished: {status.finished}"
        for group in self.groups.values():
            if group.state not in (GroupState.CONSUMED, GroupState.DROPPED):
                yield f"{group.purpose.name} group {group.group_id} is {group.state.name}"
            if (group.state is GroupState.DROPPED) != (group.drop_reason is not None):
                yield f"group {group.group_id} is {group.state.name} for {group.drop_reason}"
        for ticket_group in {ticket.group_id for _, ticket in self._tickets()} - set(self.groups):
            yield f"group {ticket_group} was lent and is not exported"

    def _tickets(self) -> Iterator[tuple[Call, replay_pb2.Ticket]]:
        for call in self.record.of("AcquireTickets"):
            for ticket in call.reply.tickets:
                yield call, ticket

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
            if group.state is GroupState.CONSUMED and group.purpose is Purpose.TRAIN:
                yield from self._pi(group, trajectory)

    def _pi(self, group: GroupRecord, trajectory: Trajectory) -> Iterator[str]:
        trained_from = self.tree.surviving.get(group.step - 1)
        logprobs = read_policy_logprobs(self.directory, group.step).get(trajectory.trajectory_id)
        if trained_from is None or logprobs is None:
            yield f"{trajectory.trajectory_id}: nobody knows how step {group.step} was trained on it"
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

    # 5

    def fresh(self) -> Iterator[str]:
        for group in self.groups.values():
            if group.purpose is Purpose.TRAIN and group.state is GroupState.CONSUMED:
                yield from self._too_old(group.group_id, f"step {group.step}", self.tree.surviving.get(group.step - 1))
        for epoch, step, group_ids in self._draws():
            for group_id in group_ids:
                where = f"the draw of step {step} in epoch {epoch}"
                yield from self._too_old(group_id, where, self.tree.heads.get((epoch, step - 1)))

    def _too_old(self, group_id: str, where: str, head: PolicyVersion | None) -> Iterator[str]:
        if head is None:
            yield f"{where}: nobody knows the head that group {group_id} was drawn for"
            return
        bound = self.spec.max_staleness
        for record in self.groups[group_id].trajectories:
            trajectory = self._assembled(record)
            if isinstance(trajectory, str):
                yield f"{where}: {trajectory}"
                continue
            for span in trajectory.version_spans:
                lag = self.tree.lag(span.version, head)
                if lag is None or lag > bound or (bound == 0 and span.version != head):
                    yield f"{where}: {record.trajectory_id} has tokens of {span.version}, {lag} steps behind {head}"

    # 6

    def in_order(self) -> Iterator[str]:
        delivered: dict[tuple[str, int, int], int] = {}  # when an item was first on its way
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
        lent: dict[str, int] = defaultdict(int)
        for _, ticket in self._tickets():
            if ticket.attempt <= lent[ticket.group_id]:
                yield f"group {ticket.group_id}: attempt {ticket.attempt} was lent after {lent[ticket.group_id]}"
            lent[ticket.group_id] = max(lent[ticket.group_id], ticket.attempt)

    # 7

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
        for call, ticket in self._tickets():
            for member in ticket.members:
                attempts[member.trajectory_id].append((call.ended or 0, ticket.attempt))
        for write in self.record.writes:
            for handed_out, attempt in attempts[write.item.trajectory_id]:
                if write.acknowledged and handed_out < write.sent and attempt > write.item.attempt:
                    yield f"{_name(write)} was acknowledged after attempt {attempt} was lent"


class _VersionTree:
    """Versions by parent, from what learners announced."""

    def __init__(self, record: Record, root: PolicyVersion) -> None:
        self._parents: dict[PolicyVersion, PolicyVersion | None] = {root: None}
        self.heads: dict[tuple[int, int], PolicyVersion] = {}
        """(epoch, step) -> the head of that learner at that step."""
        last = root
        for call in sorted(
            [*record.of("OpenRun"), *record.of("Advance", succeeded=False)], key=lambda call: call.begun
        ):
            if call.method == "OpenRun":
                version = codec.version_from_proto(call.request.checkpoint)
                self.heads[call.reply.epoch, version.step] = version
                continue
            # One without an answer may have been taken; it is either repeated or abandoned, and changes no lag.
            version = codec.version_from_proto(call.request.version)
            self._parents[version] = codec.version_from_proto(call.request.parent)
            self.heads[version.epoch, version.step] = version
            if call.succeeded and version.step >= last.step:
                last = version
        self.surviving = {version.step: version for version in self.ancestry(last)}
        """step -> version of the history that led to the run's last version."""

    def lag(self, version: PolicyVersion, head: PolicyVersion) -> int | None:
        """Steps from the common ancestor to the head; None for a version that nobody announced."""
        if version not in self._parents:
            return None
        on_path = set(self.ancestry(head))
        return head.step - next(ancestor for ancestor in self.ancestry(version) if ancestor in on_path).step

    def ancestry(self, version: PolicyVersion | None) -> Iterator[PolicyVersion]:
        while version is not None:
            yield version
            version = self._parents[version]


def _first_difference(
    trajectory: Trajectory, version: PolicyVersion, logprobs: np.ndarray, span: VersionSpan
) -> tuple[int | None, float]:
    """The first token of a span whose log-prob is not the law's at `version`, and what the law says of it."""
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
