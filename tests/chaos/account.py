"""The oracle's judgement at the end of a chaos run: what passed the proxies, beside what the buffer exports.

Invariants 1 and 3 to 7 are those of `tests.harness.oracle`. Here what was trained is read off the versions: a
rehearsal's digest hashes its whole history, so the chain of announced digests says which groups led to each of them.

    2  once       the version of each surviving step is the law's for the groups that were drawn for it, in their order
    10 stable     every reply to a draw of one (epoch, step) brings the same groups
    11 replayed   what is exported of a committed step is, byte for byte, what was drawn; nothing names another run
"""

from __future__ import annotations

import hashlib
import struct
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from leeway import arithmetic, codec
from leeway.trajectory.assembly import assemble_records
from leeway.types import DropReason, GroupRecord, GroupState, Purpose, TrajectoryRecord
from leeway.weights.digests import weights_digest
from tests.harness.oracle import LEGAL_DROPS, Evidence, Oracle
from tests.harness.recording_proxy import Record


@dataclass(frozen=True, slots=True)
class _Draw:
    epoch: int
    step: int
    groups: tuple[GroupRecord, ...]

    @property
    def group_ids(self) -> tuple[str, ...]:
        return tuple(group.group_id for group in self.groups)


class Account(Oracle):
    """Judges one run of a chaos suite."""

    legal_drops = {  # noqa: RUF012 (nobody changes it)
        Purpose.TRAIN: LEGAL_DROPS[Purpose.TRAIN] | {DropReason.ROLLED_BACK},
        Purpose.EVAL: LEGAL_DROPS[Purpose.EVAL],
    }

    def __init__(self, evidence: Evidence, *, finished: bool) -> None:
        super().__init__(evidence)
        self._finished = finished
        self._drawn = [
            _Draw(
                call.request.epoch,
                call.request.step,
                tuple(assemble_records([piece for reply in call.replies for piece in reply.pieces])),
            )
            for call in self.record.of("DrawBatch")
        ]

    def violations(self) -> list[str]:
        """What does not hold; of a run that could not finish, what must hold at any time."""
        checks = {
            1: self.kept,
            2: self.once,
            3: self.balanced,
            4: self.true,
            5: self.fresh,
            6: self.in_order,
            7: self.fenced,
            10: self.stable,
            11: self.replayed,
        }
        always = (1, 4, 6, 7, 10)
        return [
            f"{number}: {line}"
            for number, check in checks.items()
            if self._finished or number in always
            for line in check()
        ]

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
        history = 0
        for step in steps:
            draw = self._surviving_draw(step)
            if draw is None:
                yield f"step {step}: its version was not announced, or nothing was drawn for it"
                return
            history = _next_history(history, step, draw.groups)
            manifest, _ = arithmetic.published_weights(history, step)
            if weights_digest(manifest) != self.tree.surviving[step].digest:
                yield f"step {step}: {self.tree.surviving[step]} was not trained from its parent on {draw.group_ids}"
                return
            if committed[step] != set(draw.group_ids):
                yield f"step {step}: {sorted(committed[step])} are consumed, {sorted(draw.group_ids)} were trained on"
            for group in draw.groups:
                if group.group_id in step_of:
                    yield f"group {group.group_id} was trained on in steps {step_of[group.group_id]} and {step}"
                step_of[group.group_id] = step
                if len(group.trajectories) != self.spec.members:
                    yield f"step {step}: {len(group.trajectories)} members of {group.group_id} were trained on"
        yield from self._ledgers()

    def _ledgers(self) -> Iterator[str]:
        """A ledger names what was drawn for the versions that led to its checkpoint, wherever a rollback left them."""
        for call in self.record.of("OpenRun"):
            checkpoint = codec.version_from_proto(call.request.checkpoint)
            epochs = {version.step: version.epoch for version in self.tree.ancestry(checkpoint)}
            for entry in call.request.ledger:
                step, group_ids = entry.step, tuple(entry.group_ids)
                drawn = [draw.group_ids for draw in self._drawn if (draw.epoch, draw.step) == (epochs[step], step)]
                if group_ids not in drawn:
                    yield f"step {step}: the ledger of epoch {call.reply.epoch} says {group_ids}, drawn were {drawn}"

    def _surviving_draw(self, step: int) -> _Draw | None:
        version = self.tree.surviving.get(step)
        found = [draw for draw in self._drawn if version and (draw.epoch, draw.step) == (version.epoch, step)]
        return found[0] if found else None

    def _pi(self, group: GroupRecord, trajectory: object) -> Iterator[str]:
        return iter(())  # the digest of the version says what it was trained on

    # 10

    def stable(self) -> Iterator[str]:
        first: dict[tuple[int, int], tuple[str, ...]] = {}
        for draw in self._drawn:
            before = first.setdefault((draw.epoch, draw.step), draw.group_ids)
            if before != draw.group_ids:
                yield f"epoch {draw.epoch} drew {before} for step {draw.step}, and later {draw.group_ids}"
            if len(set(draw.group_ids)) != self.spec.groups_per_step:
                yield f"epoch {draw.epoch} drew {draw.group_ids} for step {draw.step}"

    # 11

    def replayed(self) -> Iterator[str]:
        for step in range(1, self.spec.total_steps + 1):
            draw = self._surviving_draw(step)
            for group in draw.groups if draw is not None else ():
                exported = self.groups.get(group.group_id)
                if exported is None or _content(exported.trajectories) != _content(group.trajectories):
                    yield f"step {step}: group {group.group_id} is not exported as it was drawn"
        run = self.spec.run
        for group in self.groups.values():
            if not group.group_id.startswith(f"{run}-"):
                yield f"group {group.group_id} is exported for run {run}"
        for draw in self._drawn:
            if any(not group_id.startswith(f"{run}-") for group_id in draw.group_ids):
                yield f"step {draw.step} of run {run} drew {draw.group_ids}"


class Blind(Oracle):
    """What can be said without an export: the buffer does not even start, or does not know the run."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def violations(self) -> list[str]:
        checks = {1: self.kept, 6: self.in_order, 7: self.fenced}
        return [f"{number}: {line}" for number, check in checks.items() for line in check()]

    def kept(self) -> Iterator[str]:
        acknowledged = [write.item.trajectory_id for write in self.record.writes if write.acknowledged]
        if acknowledged:
            yield f"{len(acknowledged)} writes were acknowledged, and none of them can be had again"
        yield from self._forgotten()


def wrongly_retired(record: Record, groups: Sequence[GroupRecord], kept: Sequence[GroupRecord]) -> Iterator[str]:
    """What a buffer with retention exports beside what its whole log says: too little, or something else."""
    exported = {group.group_id: group for group in kept}
    oldest_kept_step = max((call.request.oldest_kept_step for call in record.of("Commit")), default=0)
    for group in groups:
        there = exported.pop(group.group_id, None)
        if there is not None:
            if (there.state, _content(there.trajectories)) != (group.state, _content(group.trajectories)):
                yield f"group {group.group_id} is exported otherwise than its log says"
        elif group.state not in (GroupState.CONSUMED, GroupState.DROPPED):
            yield f"group {group.group_id} is retired, though it is {group.state.name}"
        elif group.state is GroupState.CONSUMED and group.purpose is Purpose.TRAIN and group.step > oldest_kept_step:
            kept_step = f"a checkpoint of step {oldest_kept_step} is kept"
            yield f"group {group.group_id} of step {group.step} is retired, but {kept_step}"
    for group_id in exported:
        yield f"group {group_id} is exported, and its log does not know it"


def _content(trajectories: Sequence[TrajectoryRecord]) -> list[object]:
    return [(each.trajectory_id, each.attempt, each.server_id, each.close, each.chunks) for each in trajectories]


def _next_history(history: int, step: int, groups: Sequence[GroupRecord]) -> int:
    """What the rehearsal's weights become by a step: a hash over everything that was trained on, in order."""
    digest = hashlib.sha256(struct.pack("<QQ", history, step))
    for group in groups:
        rewards = [member.close.reward for member in group.trajectories if member.close is not None]
        digest.update(group.group_id.encode() + b"\0" + struct.pack(f"<{len(rewards)}d", *rewards))
    return int.from_bytes(digest.digest()[:8], "little") >> 1
