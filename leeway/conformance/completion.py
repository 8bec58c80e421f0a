"""What one Generate call sent, kept as it came: a kit must be able to look at what is wrong."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from leeway.types import (
    Array,
    Column,
    ColumnKind,
    FinishReason,
    Float32Array,
    Int32Array,
    SamplingParams,
    TrajectoryChunk,
    VersionSpan,
)


@dataclass(slots=True)
class Completion:
    """Chunks in order, and how it ended."""

    prompt: Int32Array  # [prompt]
    sampling: SamplingParams
    chunks: list[TrajectoryChunk] = field(default_factory=list[TrajectoryChunk])
    malformed: list[str] = field(default_factory=list[str])  # chunks that are none, and why
    finish_reason: FinishReason | None = None
    announced_tokens: int = 0  # as `finished` says
    after_finished: int = 0  # messages that came later

    def columns(self, kind: ColumnKind) -> list[Column]:
        """All columns of a kind, in the order in which they came."""
        return [column for chunk in self.chunks for column in chunk.columns if column.kind is kind]

    def values(self, kind: ColumnKind) -> Array:
        """Their values, one after the other; [0] when there are none."""
        columns = self.columns(kind)
        return np.concatenate([column.values for column in columns]) if columns else np.zeros(0)

    @property
    def token_ids(self) -> Int32Array:
        """[n], the sampled tokens."""
        return self.values(ColumnKind.TOKEN_IDS).astype(np.int32)

    @property
    def logprobs(self) -> Float32Array:
        """[n], what they were sampled with, as claimed."""
        return self.values(ColumnKind.BEHAVIOR_LOGPROBS).astype(np.float32)

    @property
    def spans(self) -> list[VersionSpan]:
        """All version spans, in the order in which they came."""
        return [span for chunk in self.chunks for span in chunk.version_spans]

    def equals(self, other: Completion, tolerance: float, count: int | None = None) -> bool:
        """Whether the first `count` tokens are the same and their log-probs agree."""
        ids, logprobs = self.token_ids[:count], self.logprobs[:count]
        other_ids, other_logprobs = other.token_ids[:count], other.logprobs[:count]
        return (
            ids.shape == other_ids.shape
            and logprobs.shape == other_logprobs.shape
            and bool((ids == other_ids).all())
            and bool((np.abs(logprobs - other_logprobs) <= tolerance).all())
        )
