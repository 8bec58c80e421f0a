"""Trajectories: in pieces, as they are sampled, and whole, as they are trained on.

Token axes count from a trajectory's first token, ranges are half-open.

Shape legend: n tokens of a trajectory, L MoE layers, k experts per token, K recorded candidates per token.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leeway.types.policy import VersionSpan

Int32Array = NDArray[np.int32]
Float32Array = NDArray[np.float32]
BoolArray = NDArray[np.bool_]
Array = NDArray[Any]


class FinishReason(enum.IntEnum):
    """Why sampling ended."""

    STOP = 1
    LENGTH = 2
    CONTEXT = 3
    ABORTED = 4
    ENVIRONMENT_DONE = 5


class SegmentKind(enum.IntEnum):
    """The author of a stretch of a trajectory."""

    PROMPT = 1
    MODEL = 2
    ENVIRONMENT = 3


class ColumnKind(enum.IntEnum):
    """The kinds of value that a column holds, one for each token of its range."""

    TOKEN_IDS = 1
    BEHAVIOR_LOGPROBS = 2
    TOPK_TOKEN_IDS = 3
    TOPK_LOGPROBS = 4
    ROUTING = 5


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
