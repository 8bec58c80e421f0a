"""The words of Leeway as frozen dataclasses: what travels between the parts of a service.

Arrays are NumPy, token axes count from a trajectory's first token, ranges are half-open. The wire forms live in
`proto/leeway/v1`; `leeway.codec` is the only place that translates.

Shape legend: n tokens of a trajectory, L MoE layers, k experts per token, K recorded candidates per token.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Int32Array = NDArray[np.int32]
Float32Array = NDArray[np.float32]
BoolArray = NDArray[np.bool_]
Array = NDArray[Any]


class Purpose(enum.IntEnum):
    """What a ticket is for."""

    TRAIN = 1
    EVAL = 2


class FinishReason(enum.IntEnum):
    """Why sampling ended."""

    STOP = 1
    LENGTH = 2
    CONTEXT = 3
    ABORTED = 4
    ENVIRONMENT_DONE = 5


class SegmentKind(enum.IntEnum):
    """Who wrote a stretch of a trajectory."""

    PROMPT = 1
    MODEL = 2
    ENVIRONMENT = 3


class ColumnKind(enum.IntEnum):
    """What a column holds for each token of its range."""

    TOKEN_IDS = 1
    BEHAVIOR_LOGPROBS = 2
    TOPK_TOKEN_IDS = 3
    TOPK_LOGPROBS = 4
    ROUTING = 5


class LogprobMode(enum.IntEnum):
    """Which distribution the behavior log-probs come from."""

    SAMPLED = 1
    RAW = 2


class GroupState(enum.IntEnum):
    """Where a group is in its life."""

    OPEN = 1
    READY = 2
    DRAWN = 3
    CONSUMED = 4
    DROPPED = 5


class DropReason(enum.IntEnum):
    """Why a group was dropped; the first durable reason stands."""

    STALE = 1
    FAILED = 2
    LEASE_LOST = 3
    DEAD_LETTER = 4
    NO_SIGNAL = 5
    INVALID = 6
    CONFLICT = 7
    UNKNOWN_VERSION = 8
    ROLLED_BACK = 9
    RUN_END = 10
    DIVERGED = 11


class DrainReason(enum.IntEnum):
    """Why a server is drained."""

    DIVERGING = 1
    SLOW = 2
    OPERATOR = 3


class WriteStatus(enum.IntEnum):
    """What became of one written item."""

    ACKNOWLEDGED = 1
    ABORTED = 2
    CONFLICT = 3
    OUT_OF_RANGE = 4
    INVALID = 5
    UNKNOWN = 6
    EXHAUSTED = 7


@dataclass(frozen=True, slots=True)
class PolicyVersion:
    """The identity of one set of weights; never reused."""

    run: str
    epoch: int  # the learner incarnation that made it; 0 for the run's first weights
    step: int  # optimizer steps along its own history
    digest: bytes  # SHA-256 of the published weights

    def __str__(self) -> str:
        return f"{self.run}/{self.epoch}.{self.step}@{self.digest.hex()[:8]}"


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Tokens [start_token, end_token) were sampled by `version`."""

    start_token: int
    end_token: int
    version: PolicyVersion


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the engine samples and what it records."""

    temperature: float = 1.0
    max_tokens: int = 1
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    topk: int = 0  # K of the top-K columns; 0 records none
    routing: bool = False


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch [start_token, end_token) with one author."""

    kind: SegmentKind
    start_token: int
    end_token: int
    in_loss: bool = False
    sampling: SamplingParams | None = None
    engine: str = ""


@dataclass(frozen=True, slots=True)
class ModelSignature:
    """What makes two models exchangeable for a run."""

    model_digest: bytes
    tokenizer_digest: bytes
    vocab_size: int
    moe_layers: int  # 0 for a dense model, as are the next two
    experts: int
    experts_per_token: int
    context_length: int


@dataclass(frozen=True, slots=True)
class Column:
    """Values for tokens [start_token, end_token); values.shape[0] == end_token - start_token."""

    kind: ColumnKind
    start_token: int
    end_token: int
    values: Array


@dataclass(frozen=True, slots=True)
class TrajectoryChunk:
    """One numbered piece of a trajectory."""

    columns: tuple[Column, ...] = ()
    segments: tuple[Segment, ...] = ()
    version_spans: tuple[VersionSpan, ...] = ()


@dataclass(frozen=True, slots=True)
class TrajectoryClose:
    """How a trajectory ended; count and digest seal exactly what was written."""

    chunk_count: int
    token_count: int
    digest: bytes  # chain over the chunks, see proto
    finish_reason: FinishReason
    reward: float
    generation_started_at: datetime
    generation_finished_at: datetime
    encoded: bytes = field(default=b"", compare=False, repr=False)  # as it came; empty for one that is made here


@dataclass(frozen=True, slots=True)
class TrajectoryFailure:
    """Why a trajectory could not be finished."""

    message: str
    retryable: bool


@dataclass(frozen=True, slots=True)
class TicketMember:
    """One trajectory to sample."""

    trajectory_id: str
    member: int
    seed: int


@dataclass(frozen=True, slots=True)
class Ticket:
    """A loan of a group's missing members to one server."""

    group_id: str
    attempt: int
    purpose: Purpose
    task_index: int
    members: tuple[TicketMember, ...]
    sampling: SamplingParams
    lease_seconds: float
    pinned_version: PolicyVersion | None = None  # EVAL only
    evaluation_id: str = ""  # EVAL only


class WriteItem(NamedTuple):
    """One write: a serialized TrajectoryChunk, a close or a failure."""

    trajectory_id: str
    attempt: int
    seq: int
    content: bytes | memoryview | TrajectoryClose | TrajectoryFailure
    encoded: bytes = b""  # the whole item as it came; empty for one that is made here


class WriteResult(NamedTuple):
    """The answer to one WriteItem."""

    trajectory_id: str
    attempt: int
    seq: int
    status: WriteStatus
    expected_seq: int = 0
    message: str = ""
    retry_seconds: float = 0.0  # for EXHAUSTED: how long to wait; 0 when not said


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A whole trajectory, its columns aligned on one token axis."""

    trajectory_id: str
    member: int
    attempt: int
    server_id: str
    token_ids: Int32Array  # [n]
    behavior_logprobs: Float32Array  # [n], 0 where no token was sampled
    loss_mask: BoolArray  # [n], true on sampled tokens that enter the loss
    version_spans: tuple[VersionSpan, ...]
    segments: tuple[Segment, ...]
    reward: float
    finish_reason: FinishReason
    generation_started_at: datetime
    generation_finished_at: datetime
    routing: Array | None = None  # [n - 1, L, k] uint8 or uint16
    topk_token_ids: Int32Array | None = None  # [n, K], 0 where no token was sampled
    topk_logprobs: Float32Array | None = None  # [n, K]
    digest: bytes = b""  # chain over its chunks, as its close sealed them

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids.shape[0])


@dataclass(frozen=True, slots=True)
class TrajectoryGroup:
    """The members sampled for one task, whole, in member order."""

    group_id: str
    task_index: int
    trajectories: tuple[Trajectory, ...]


@dataclass(frozen=True, slots=True)
class GroupRecord:
    """A group as exported: with its fate, complete or not."""

    group_id: str
    purpose: Purpose
    task_index: int
    state: GroupState
    drop_reason: DropReason | None
    drop_message: str
    step: int
    evaluation_id: str
    issued_at: datetime
    trajectories: tuple[TrajectoryRecord, ...]


@dataclass(frozen=True, slots=True)
class TrajectoryRecord:
    """A trajectory as exported: its acknowledged bytes and how it ended, if it did."""

    trajectory_id: str
    member: int
    attempt: int
    server_id: str
    close: TrajectoryClose | None
    failure: str
    chunks: tuple[bytes, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class RunSpec:
    """What a run is; fixed at its first OpenRun."""

    run: str
    groups_per_step: int  # B
    members: int  # trajectories per group
    max_staleness: int  # S
    total_steps: int  # T
    seed: int
    train_task_count: int
    sampling: SamplingParams
    signature: ModelSignature
    dataset_digest: bytes
    root: PolicyVersion
    max_attempts: int
    drop_no_signal: bool = False  # groups with equal rewards are dropped when complete


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A measurement of one pinned version on the first `task_count` held-out tasks."""

    evaluation_id: str
    version: PolicyVersion
    task_count: int
    members: int
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """Rewards of the groups that completed, in task and member order."""

    complete: bool
    rewards: tuple[float, ...]
    failed: int


@dataclass(frozen=True, slots=True)
class OpenedRun:
    """What a learner gets when it opens a run."""

    epoch: int
    head: PolicyVersion
    finished: bool


@dataclass(frozen=True, slots=True)
class Rollback:
    """An explicit rollback: later steps of lower epochs are abandoned."""

    version: PolicyVersion  # what the run was returned to
    epoch: int  # the fence that it raised; no learner holds it


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A group that was set aside although nothing gives its task back."""

    group_id: str
    task_index: int
    reason: DropReason
    message: str
    attempts: int  # tickets that its task cost, those of lost groups before it included
    server_id: str  # the last that held it


@dataclass(frozen=True, slots=True)
class Drain:
    """That a server gets no more tickets, and why."""

    reason: DrainReason
    message: str
    drained_at: datetime


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """What the buffer knows of one server of a run; times are on the buffer's clock."""

    server_id: str
    present: bool  # has said something within a lease, and has not left
    drained: Drain | None
    version: PolicyVersion | None  # that it last asked for work at
    loans: int  # groups that it holds
    oldest_loan_seconds: float  # 0 without one
    timed_loans: int  # training groups that it finished lately or still holds
    median_loan_seconds: float  # of these, from ticket to last close; what it holds counts with its age


@dataclass(frozen=True, slots=True)
class RunStatus:
    """Counts of training groups by state; issued = open + ready + drawn + consumed + sum(dropped)."""

    spec: RunSpec
    epoch: int
    head: PolicyVersion
    committed_step: int
    finished: bool
    issued: int
    open: int
    ready: int
    drawn: int
    consumed: int
    dropped: Mapping[DropReason, int]
    rollback: Rollback | None = None  # the newest explicit one
    dead_letters: int = 0  # whose tasks were not queued again


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a published version."""

    name: str
    dtype: str  # "bfloat16", "float32", ...
    shape: tuple[int, ...]
    digest: bytes  # SHA-256 of its bytes
    size_bytes: int


@dataclass(frozen=True, slots=True)
class WeightManifest:
    """What a published version consists of, ordered by name."""

    tensors: tuple[TensorEntry, ...]

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.tensors)


@dataclass(frozen=True, slots=True)
class WeightSnapshot:
    """Published weights: little-endian bytes per tensor, in manifest order."""

    version: PolicyVersion
    publisher_epoch: int
    manifest: WeightManifest
    buffers: Sequence[bytes | memoryview] = field(repr=False)


@dataclass(frozen=True, slots=True)
class WeightDelta:
    """A payload that leads from one published version to another."""

    base_digest: bytes
    target_digest: bytes
    digest: bytes  # SHA-256 of the payload
    size_bytes: int


@dataclass(frozen=True, slots=True)
class WeightRequest:
    """Parts [first_part, end_part) of a version: its tensors, or the deltas that lead to it from `base_digest`."""

    version: PolicyVersion
    base_digest: bytes = b""  # empty: tensors
    first_part: int = 0
    end_part: int = 0  # 0: all that follow


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine serves."""

    signature: ModelSignature
    engine: str  # "name/version"
    logprob_mode: LogprobMode
    version: PolicyVersion | None
    max_topk: int
    routing: bool
    max_concurrency: int
