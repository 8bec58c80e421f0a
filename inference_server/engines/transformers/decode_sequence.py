"""One sequence while it is sampled: its tokens and columns, and how much of them has been streamed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from inference_server.engine import GenerationEnd, GenerationRequest
from leeway.types import (
    Array,
    Column,
    ColumnKind,
    FinishReason,
    Float32Array,
    Int32Array,
    PolicyVersion,
    TrajectoryChunk,
    VersionSpan,
)


@dataclass(frozen=True, slots=True)
class RoutingShape:
    """Shape of one token's routing, and its element type."""

    num_layers: int
    experts_per_token: int
    dtype: np.dtype[np.uint8] | np.dtype[np.uint16]


class DecodeSequence:
    """A request, its sampled tokens and their columns.

    Token `length - 1` is known but not yet fed to the model; so `length - 1` tokens have routing.

    Args:
        request: checked against the model.
        context_length: most tokens of a sequence.
        routing: what a token's routing looks like; None when it is not recorded.
        emit: takes each chunk, the end, or the error that ended the sequence; called in the event loop's thread.
    """

    def __init__(
        self,
        request: GenerationRequest,
        context_length: int,
        routing: RoutingShape | None,
        emit: Callable[[TrajectoryChunk | GenerationEnd | Exception], None],
    ) -> None:
        prompt, sampling = request.prompt_token_ids, request.sampling
        self.request_id = request.request_id
        self.prompt_length = int(prompt.shape[0])
        self.temperature = sampling.temperature
        self.seed = sampling.seed
        self.topk = sampling.topk
        self.emit = emit
        self.ended = False  # nothing more will be emitted
        self.length = self.prompt_length
        self.max_length = min(self.prompt_length + sampling.max_tokens, context_length)
        self.version: PolicyVersion | None = None
        self.last_token = int(prompt[-1])
        self._max_tokens = sampling.max_tokens
        self._stop_token_ids = frozenset(sampling.stop_token_ids)
        self._token_ids: Int32Array = np.empty(self.max_length, np.int32)
        self._token_ids[: self.prompt_length] = prompt
        self._logprobs: Float32Array = np.empty(self.max_length, np.float32)
        self._topk_token_ids: Int32Array = np.empty((self.max_length, self.topk), np.int32)
        self._topk_logprobs: Float32Array = np.empty((self.max_length, self.topk), np.float32)
        self._routing: Array | None = None
        if routing is not None:
            shape = (self.max_length - 1, routing.num_layers, routing.experts_per_token)
            self._routing = np.empty(shape, routing.dtype)
        self._routed = 0  # tokens with routing
        self._streamed = self.prompt_length
        self._streamed_routing = 0
        self._span_starts: list[tuple[int, PolicyVersion]] = []  # not yet streamed
        self._started_at = datetime.now(UTC)

    @property
    def prompt(self) -> Int32Array:
        return self._token_ids[: self.prompt_length]

    @property
    def records_routing(self) -> bool:
        return self._routing is not None

    @property
    def num_unstreamed(self) -> int:
        return self.length - self._streamed

    def start(self) -> None:
        """Note the time at which sampling begins."""
        self._started_at = datetime.now(UTC)

    def route(self, rows: Array) -> None:
        """Add the routing of the tokens just fed, [fed, L, k]."""
        if self._routing is not None:
            self._routing[self._routed : self._routed + rows.shape[0]] = rows
            self._routed += rows.shape[0]

    def append(self, token_id: int, logprob: float, version: PolicyVersion) -> None:
        """Add a token that `version` has sampled."""
        if version is not self.version:
            self._span_starts.append((self.length, version))
            self.version = version
        self._token_ids[self.length] = token_id
        self._logprobs[self.length] = logprob
        self.last_token = token_id
        self.length += 1

    def append_candidates(self, token_ids: Int32Array, logprobs: Float32Array) -> None:
        """Add the top-K of the token just appended; both [at least K]."""
        self._topk_token_ids[self.length - 1] = token_ids[: self.topk]
        self._topk_logprobs[self.length - 1] = logprobs[: self.topk]

    def finish_reason(self) -> FinishReason | None:
        """Why the sequence ends with the token just appended, or None."""
        if self.last_token in self._stop_token_ids:
            return FinishReason.STOP
        if self.length < self.max_length:
            return None
        return FinishReason.LENGTH if self.length - self.prompt_length == self._max_tokens else FinishReason.CONTEXT

    def take_chunk(self) -> TrajectoryChunk:
        """Everything known and not yet streamed."""
        start, end = self._streamed, self.length
        columns = [self._column(ColumnKind.TOKEN_IDS, start, end, self._token_ids)]
        columns.append(self._column(ColumnKind.BEHAVIOR_LOGPROBS, start, end, self._logprobs))
        if self.topk:
            columns.append(self._column(ColumnKind.TOPK_TOKEN_IDS, start, end, self._topk_token_ids))
            columns.append(self._column(ColumnKind.TOPK_LOGPROBS, start, end, self._topk_logprobs))
        if self._routing is not None:
            columns.append(self._column(ColumnKind.ROUTING, self._streamed_routing, self._routed, self._routing))
            self._streamed_routing = self._routed
        spans = self._take_spans(end)
        self._streamed = end
        return TrajectoryChunk(columns=tuple(columns), version_spans=spans)

    def end(self, reason: FinishReason) -> GenerationEnd:
        """The last item."""
        return GenerationEnd(reason, self.length - self.prompt_length, self._started_at, datetime.now(UTC))

    def _take_spans(self, end: int) -> tuple[VersionSpan, ...]:
        starts = self._span_starts
        ends = [next_start for next_start, _ in starts[1:]] + [end]
        # The first start is where the last chunk ended; its span is empty when a new version came just there.
        spans = (VersionSpan(begin, stop, by) for (begin, by), stop in zip(starts, ends, strict=True) if begin < stop)
        self._span_starts = [(end, starts[-1][1])]
        return tuple(spans)

    def _column(self, kind: ColumnKind, start: int, end: int, values: Array) -> Column:
        return Column(kind, start, end, values[start:end].copy())
