"""Small runs, trajectories and writes for tests of the replay buffer."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from leeway import codec
from leeway.types import (
    Column,
    ColumnKind,
    FinishReason,
    GroupState,
    ModelSignature,
    PolicyVersion,
    Purpose,
    RunSpec,
    SamplingParams,
    Segment,
    SegmentKind,
    Ticket,
    TicketMember,
    TrajectoryChunk,
    TrajectoryClose,
    VersionSpan,
    WriteItem,
    WriteResult,
    WriteStatus,
)
from replay_buffer.live.open_trajectories import OpenTrajectories
from replay_buffer.live.writing import decide_write
from replay_buffer.rules.draw import decide_draw, drawn_batch
from replay_buffer.rules.fold import apply
from replay_buffer.rules.groups import Group, GroupMember, RecordHandle, RecordHandles
from replay_buffer.rules.lifecycle import decide_advance, decide_commit
from replay_buffer.rules.lineage import Lineage
from replay_buffer.rules.opening import Ledger, decide_after_open, decide_open_run
from replay_buffer.rules.state import RunState
from replay_buffer.rules.tickets import Expired, TaskOrder, TicketOffice, TicketRequest
from replay_buffer.rules.transitions import Transition
from replay_buffer.storage.index import Index
from replay_buffer.storage.records import Record, decode, encode
from replay_buffer.storage.run_index import RunIndex
from replay_buffer.storage.segments import Location

RUN = "test-run"
MOMENT = datetime(2026, 11, 22, tzinfo=UTC)
SIGNATURE = ModelSignature(
    model_digest=hashlib.sha256(b"model").digest(),
    tokenizer_digest=hashlib.sha256(b"tokenizer").digest(),
    vocab_size=64,
    moe_layers=0,
    experts=0,
    experts_per_token=0,
    context_length=4096,
)
DATASET = hashlib.sha256(b"tasks").digest()


def version(step: int, epoch: int = 1, run: str = RUN) -> PolicyVersion:
    """A version with a digest of its own; step 0 of epoch 0 is the root."""
    return PolicyVersion(run, epoch, step, hashlib.sha256(f"{epoch}.{step}".encode()).digest())


ROOT = version(0, epoch=0)


def spec(
    run: str = RUN,
    *,
    groups_per_step: int = 2,
    members: int = 2,
    max_staleness: int = 2,
    total_steps: int = 100,
    max_attempts: int = 3,
    train_task_count: int = 10,
    drop_no_signal: bool = False,
) -> RunSpec:
    return RunSpec(
        run=run,
        groups_per_step=groups_per_step,
        members=members,
        max_staleness=max_staleness,
        total_steps=total_steps,
        seed=7,
        train_task_count=train_task_count,
        sampling=SamplingParams(temperature=1.0, max_tokens=16),
        signature=SIGNATURE,
        dataset_digest=DATASET,
        root=version(0, epoch=0, run=run),
        max_attempts=max_attempts,
        drop_no_signal=drop_no_signal,
    )


def chunk(
    versions: Sequence[PolicyVersion] = (ROOT,),
    *,
    prompt: int = 3,
    sampled: int = 4,
    token_id: int = 5,
    logprob: float = -1.0,
) -> bytes:
    """A whole trajectory in one chunk; its sampled tokens are split evenly among the versions."""
    n = prompt + sampled
    bounds = np.linspace(prompt, n, len(versions) + 1).astype(int).tolist()
    return codec.encode_chunk(
        TrajectoryChunk(
            columns=(
                Column(ColumnKind.TOKEN_IDS, 0, n, np.full(n, token_id, np.int32)),
                Column(ColumnKind.BEHAVIOR_LOGPROBS, prompt, n, np.full(sampled, logprob, np.float32)),
            ),
            segments=(
                Segment(SegmentKind.PROMPT, 0, prompt),
                Segment(SegmentKind.MODEL, prompt, n, True, SamplingParams(max_tokens=16), "fake/1"),
            ),
            version_spans=tuple(
                VersionSpan(start, end, version)
                for version, start, end in zip(versions, bounds, bounds[1:], strict=False)
            ),
        )
    )


def close(chunks: Sequence[bytes], *, reward: float = 1.0, token_count: int = 7) -> TrajectoryClose:
    digest = codec.chain_digest(codec.EMPTY_CHAIN, *chunks)
    return TrajectoryClose(len(chunks), token_count, digest, FinishReason.STOP, reward, MOMENT, MOMENT)


def whole(member: TicketMember, attempt: int, data: bytes | None = None, *, reward: float = 1.0) -> list[WriteItem]:
    """A trajectory from its first chunk to its close."""
    data = chunk() if data is None else data
    return [
        WriteItem(member.trajectory_id, attempt, 0, data),
        WriteItem(member.trajectory_id, attempt, 1, close([data], reward=reward)),
    ]


def filled(ticket: Ticket, versions: Sequence[PolicyVersion] = (ROOT,)) -> list[WriteItem]:
    """Every trajectory of a ticket, complete."""
    return [item for member in ticket.members for item in whole(member, ticket.attempt, chunk(versions))]


class Machine:
    """A run without log or clock: decides, encodes, decodes and applies, as the buffer does."""

    def __init__(self, run_spec: RunSpec | None = None, checkpoint: PolicyVersion | None = None) -> None:
        self.spec = run_spec or spec()
        self.records: list[bytes] = []
        self.open_trajectories = OpenTrajectories()
        self.task_order = TaskOrder(self.spec.seed, self.spec.train_task_count)
        self.state = RunState(self.spec, RunIndex(Index(), self.spec.run))
        opened = decide_open_run(None, self.spec, checkpoint or self.spec.root, [])
        assert opened is not None
        self.record(opened)

    def record(self, *transitions: Transition | None) -> None:
        for transition in transitions:
            if transition is not None:
                payload = b"".join(encode(Record(self.spec.run, len(self.records), transition)))
                self.records.append(payload)
                _apply(self.state, payload, len(self.records) - 1)

    def read(self, record: RecordHandle) -> Transition:
        return decode(self.records[Location.of(record).offset]).transition

    def refolded(self) -> RunState:
        """The state as a restart would find it."""
        state = RunState(self.spec, RunIndex(Index(), self.spec.run))
        for index, payload in enumerate(self.records):
            _apply(state, payload, index)
        return state

    def reopen(self, checkpoint: PolicyVersion, ledger: Ledger = ()) -> int:
        self.record(decide_open_run(self.state, self.spec, checkpoint, ledger))
        self.record(*decide_after_open(self.state))
        return self.state.epoch

    def acquire(
        self,
        version: PolicyVersion | None = None,
        max_members: int = 10_000,
        *,
        server_id: str = "s0",
        capacity: int = 10_000,
        expired: Expired = lambda _: False,
    ) -> list[Ticket]:
        request = TicketRequest(server_id, version or self.state.head, capacity)
        office = TicketOffice(self.state, request, self.task_order, expired, 30.0)
        issued = office.issue(max_members)
        self.record(*issued)
        return [entry.ticket for entry in issued]

    def write(self, *items: WriteItem, room: bool = True) -> list[WriteResult]:
        results: list[WriteResult] = []
        for item in items:
            decision = decide_write(self.state, item, self.read, self.open_trajectories, room=room)
            self.record(*decision.transitions)
            results.append(decision.result)
        return results

    def fill(self, tickets: Sequence[Ticket], versions: Sequence[PolicyVersion] | None = None) -> None:
        """Complete tickets with tokens of these versions (default: the head)."""
        for ticket in tickets:
            for result in self.write(*filled(ticket, versions or [self.state.head])):
                assert result.status is WriteStatus.ACKNOWLEDGED, result

    def draw(self, expired: Expired = lambda _: True) -> tuple[str, ...] | None:
        """The next step's batch; by default nobody who is at work is waited for."""
        step = self.state.head.step + 1
        if drawn_batch(self.state, self.state.epoch, step) is None:
            self.record(decide_draw(self.state, self.state.epoch, step, expired))
        batch = drawn_batch(self.state, self.state.epoch, step)
        return None if batch is None else batch.group_ids

    def advance(self, expired: Expired = lambda _: False) -> PolicyVersion:
        """Train the drawn step."""
        epoch, head = self.state.epoch, self.state.head
        new = version(head.step + 1, epoch, self.spec.run)
        self.record(decide_advance(self.state, epoch, new, head, expired))
        return new

    def step(self) -> tuple[str, ...]:
        """One whole step on fresh groups."""
        self.fill(self.acquire())
        groups = self.draw()
        assert groups is not None
        self.advance()
        return groups

    def commit(self, step: int | None = None) -> None:
        self.record(decide_commit(self.state, self.state.epoch, self.state.head.step if step is None else step))

    def states(self) -> dict[GroupState, int]:
        """How many training groups are in each state."""
        return dict(Counter(group.state for group in self.state.groups.values() if group.purpose is Purpose.TRAIN))


def _apply(state: RunState, payload: bytes, index: int) -> None:
    record = decode(payload)
    apply(state, record.transition, record.recorded_at_ns, Location(1, index, len(payload)).handle)


def lag(lineage: Lineage, version: PolicyVersion) -> int:
    """Optimizer steps along the surviving history from a registered version to the head."""
    return lineage.head.step - lineage.lineage_step(version)


def snapshot(state: RunState) -> dict[str, object]:
    """Everything a state consists of, comparable."""
    return {
        "status": state.status(),
        "groups": [described(group) for group in state.groups.values()],
        "batches": {step: (batch.group_ids, batch.sealed) for step, batch in state.batches.items()},
        "tasks": (state.task_cursor, list(state.requeued)),
        "live": [list(state.live), list(state.live_evaluation)],
        "evaluations": {
            key: (evaluation.evaluation, evaluation.group_ids, evaluation.closed)
            for key, evaluation in state.evaluations.items()
        },
        "lags": {str(known): lag(state.lineage, known) for known in state.lineage},
    }


def described(thing: Any) -> Any:
    """Everything that a state consists of, as far down as it goes, so that no new field is forgotten."""
    if isinstance(thing, RunState):
        others = {name: value for name, value in vars(thing).items() if name not in ("ended", "groups")}
        return {**described(others), "groups": described(thing.groups.values())}
    if isinstance(thing, Lineage):
        return described(vars(thing))
    if isinstance(thing, (Group, GroupMember)):
        return {name: described(getattr(thing, name)) for name in type(thing).__slots__}
    if isinstance(thing, RecordHandles):
        return list(thing)
    if isinstance(thing, dict):
        return {key: described(value) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)) and not hasattr(thing, "_fields"):
        return [described(entry) for entry in thing]
    if is_dataclass(thing) and thing.__hash__ is None:
        return {field.name: described(getattr(thing, field.name)) for field in fields(thing)}
    return thing
