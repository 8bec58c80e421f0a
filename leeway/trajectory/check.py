"""The checks of `assembly`, taken chunk by chunk: what a long trajectory needs at its close fits into a few numbers.

`assemble_trajectory` followed by `check_against_spec` accepts a trajectory iff `TrajectoryCheck` does; a test holds the
two to it. Where assembly marks tokens in arrays, ranges are kept here, merged as they grow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from leeway import codec
from leeway.codec.dtypes import dtype_name, wire_number
from leeway.codec.fields import Bytes, WireColumn, leading_columns
from leeway.errors import CorruptDataError, InvalidDataError
from leeway.trajectory.assembly import LAYOUT
from leeway.types import Array, ColumnKind, PolicyVersion, RunSpec, SamplingParams, SegmentKind, TrajectoryClose
from leeway.v1 import trajectory_pb2

LARGEST_LOGPROB: Final = 1e-4
"""Behavior log-probs are at most 0, up to rounding."""
_FLOAT32: Final = np.dtype("<f4")
_UINT32: Final = np.dtype("<u4")  # token ids, so that negative ones are huge
_UINT8: Final = np.dtype("u1")
_UINT16: Final = np.dtype("<u2")
_UINT8_NUMBER: Final = wire_number("uint8")


class TrajectoryCheck:
    """What has been written of one trajectory, as far as its close depends on it."""

    __slots__ = ("_columns", "_other_run", "_problem", "_run", "_segments", "_spans", "digest", "num_chunks")

    def __init__(self, run: str) -> None:
        self.digest = codec.EMPTY_CHAIN
        self.num_chunks = 0
        self._run = run
        self._other_run: PolicyVersion | None = None
        self._problem = ""  # the first chunk that does not decode says why
        self._columns: dict[int, _Column] = {}
        self._segments: dict[int, tuple[int, bool]] = {}  # start: end, whether sampled; the latest counts
        self._spans = Ranges()

    def add(self, chunk: Bytes) -> tuple[PolicyVersion, ...]:
        """Take a chunk over; returns the versions that its spans name, each once.

        Raises:
            InvalidDataError: the bytes are not a TrajectoryChunk; nothing is taken over.
        """
        columns, end = leading_columns(chunk)
        rest = codec.parse(trajectory_pb2.TrajectoryChunk, bytes(chunk[end:]))
        columns += map(codec.wire_column, rest.columns)
        self.digest = codec.chain_digest(self.digest, chunk)
        self.num_chunks += 1
        versions = codec.span_versions(rest)
        try:
            self._take(columns, rest, versions)
        except InvalidDataError as error:
            self._problem = self._problem or error.message
        return versions

    def _take(
        self,
        columns: Sequence[WireColumn],
        message: trajectory_pb2.TrajectoryChunk,
        versions: tuple[PolicyVersion, ...],
    ) -> None:
        for column in columns:
            known = self._columns.get(column.kind)
            if known is None:
                kind = codec.enum_from_proto(ColumnKind, column.kind)
                known = self._columns[column.kind] = _Column(kind)
            known.add(column)
        for segment in message.segments:
            codec.check_segment(segment)
            self._segments[segment.start_token] = segment.end_token, segment.kind == SegmentKind.MODEL
        for version in versions:
            codec.check_version(version)
            if version.run != self._run and self._other_run is None:
                self._other_run = version
        for span in message.version_spans:
            if span.end_token <= span.start_token:
                raise InvalidDataError(f"version span [{span.start_token}, {span.end_token}) is empty")
            self._spans.add(span.start_token, span.end_token)

    def check(self, close: TrajectoryClose, spec: RunSpec, sampling: SamplingParams) -> None:
        """Whether the trajectory is what its close seals, whole, and what its run asks for.

        Raises:
            CorruptDataError: the close seals other chunks.
            InvalidDataError: saying what is wrong.
        """
        n = close.token_count
        if n > spec.signature.context_length:
            raise InvalidDataError(f"{n} tokens exceed the model's context of {spec.signature.context_length}")
        if self.digest != close.digest or self.num_chunks != close.chunk_count:
            raise CorruptDataError("its chunks are not what its close sealed")
        if self._problem:
            raise InvalidDataError(self._problem)
        sampled = self._sampled(n)
        if self._spans.within(n, "version span") != sampled:
            raise InvalidDataError("version spans must cover exactly the sampled tokens")
        token_ids = self._column(ColumnKind.TOKEN_IDS, n)
        if token_ids is None or token_ids.covered != _all(n):
            raise InvalidDataError("token ids are missing")
        logprobs = self._column(ColumnKind.BEHAVIOR_LOGPROBS, n)
        if logprobs is None or logprobs.covered != sampled:
            raise InvalidDataError("behavior log-probs must cover exactly the sampled tokens; mu is never recomputed")
        if not logprobs.finite:
            raise InvalidDataError("a behavior log-prob is not a finite number of at most 0")
        routing = self._column(ColumnKind.ROUTING, max(n - 1, 0))
        if routing is not None and routing.covered != _all(max(n - 1, 0)):
            raise InvalidDataError("routing must cover every token but the last")
        topk = [self._column(kind, n) for kind in (ColumnKind.TOPK_TOKEN_IDS, ColumnKind.TOPK_LOGPROBS)]
        if (topk[0] is None) != (topk[1] is None):
            raise InvalidDataError("top-K token ids and log-probs come together")
        if any(column is not None and column.covered != sampled for column in topk):
            raise InvalidDataError("top-K columns must cover exactly the sampled tokens")
        if not sampled:
            raise InvalidDataError("no token was sampled")
        self._check_run(spec, sampling, token_ids, routing, topk[0])

    def _check_run(
        self, spec: RunSpec, sampling: SamplingParams, token_ids: _Column, routing: _Column | None, topk: _Column | None
    ) -> None:
        signature = spec.signature
        if token_ids.largest >= signature.vocab_size:
            raise InvalidDataError(f"a token id is outside the vocabulary of {signature.vocab_size}")
        if self._other_run is not None:
            raise InvalidDataError(f"tokens are labelled with {self._other_run}, a version of another run")
        if routing is not None:
            layers, experts_per_token = routing.row
            if (layers, experts_per_token) != (signature.moe_layers, signature.experts_per_token):
                raise InvalidDataError(
                    f"routing has {layers} layers x {experts_per_token} experts per token; "
                    f"the model has {signature.moe_layers} x {signature.experts_per_token}"
                )
            if routing.largest >= signature.experts:
                raise InvalidDataError(f"routing names an expert beyond the model's {signature.experts}")
        elif sampling.routing:
            raise InvalidDataError("the run records routing, but none came; does the engine provide it?")
        if sampling.topk and (topk is None or topk.row[0] < sampling.topk):
            raise InvalidDataError(f"the run records top-{sampling.topk}, but fewer came; does the engine provide it?")

    def _sampled(self, n: int) -> list[tuple[int, int]]:
        """The sampled tokens, from segments that cover all tokens without a gap."""
        sampled = Ranges()
        at = 0
        for start, (end, is_model) in sorted(self._segments.items()):
            if start != at:
                raise InvalidDataError(f"segments leave a gap or overlap at token {at}")
            if is_model:
                sampled.add(start, end)
            at = end
        if at != n:
            raise InvalidDataError(f"segments cover {at} tokens of {n}")
        return sampled.within(n, "segment")

    def _column(self, kind: ColumnKind, n: int) -> _Column | None:
        column = self._columns.get(kind)
        if column is not None:
            if column.problem:
                raise InvalidDataError(column.problem)
            column.covered = column.ranges.within(n, kind.name)
        return column


class Ranges:
    """Tokens as ranges that do not overlap."""

    __slots__ = ("_ranges", "_reach")

    def __init__(self) -> None:
        self._ranges: list[list[int]] = []
        self._reach = 0  # the largest end, empty ranges too

    def add(self, start: int, end: int) -> None:
        """One more; what follows the last one is merged with it."""
        if end > self._reach:
            self._reach = end
        if start == end:
            return
        if self._ranges and self._ranges[-1][1] == start:
            self._ranges[-1][1] = end
        else:
            self._ranges.append([start, end])

    def within(self, n: int, what: str) -> list[tuple[int, int]]:
        """Everything, in order and merged.

        Raises:
            InvalidDataError: two overlap, or one ends beyond n.
        """
        if self._reach > n:
            raise InvalidDataError(f"{what} ends at token {self._reach}: it exceeds {n} tokens")
        merged: list[tuple[int, int]] = []
        for start, end in sorted(self._ranges):
            if merged and start < merged[-1][1]:
                raise InvalidDataError(f"{what} [{start}, {end}) overlaps another")
            if merged and start == merged[-1][1]:
                merged[-1] = merged[-1][0], end
            else:
                merged.append((start, end))
        return merged


class _Column:
    """All values of one kind so far: where they are, and the extremes that matter."""

    __slots__ = ("_dtype", "covered", "finite", "kind", "largest", "problem", "ranges", "row")

    def __init__(self, kind: ColumnKind) -> None:
        self.kind = kind
        self.ranges = Ranges()
        self.covered: list[tuple[int, int]] = []
        self.problem = ""
        self.row: tuple[int, ...] = ()  # shape of one token's values
        self.largest = -1  # of ids and experts; negative ids count as huge
        self.finite = True
        self._dtype = 0

    def add(self, column: WireColumn) -> None:
        """Take values over.

        Raises:
            InvalidDataError: the column does not decode.
        """
        codec.check_column(column)
        shape = column.shape
        if not self._dtype:
            self._dtype, self.row = column.dtype, shape[1:]
            ndim, dtypes = LAYOUT[self.kind]
            name = dtype_name(column.dtype)
            if len(shape) != ndim or name not in dtypes:
                self.problem = (
                    f"{self.kind.name} must be {' or '.join(dtypes)} with {ndim} axes, but is {name} with {len(shape)}"
                )
        elif column.dtype != self._dtype or shape[1:] != self.row:
            self.problem = self.problem or f"{self.kind.name} changes its type or shape between chunks"
        if self.problem:
            return
        self.ranges.add(column.start_token, column.end_token)
        if column.size_bytes or column.encoding:
            self._look_at(column)

    def _look_at(self, column: WireColumn) -> None:
        if self.kind is ColumnKind.BEHAVIOR_LOGPROBS:
            # NaN is the minimum and the maximum of what contains it, and no comparison with it holds.
            values = _values(column, _FLOAT32)
            if not (np.minimum.reduce(values) > -np.inf and np.maximum.reduce(values) <= LARGEST_LOGPROB):
                self.finite = False
        elif self.kind is ColumnKind.TOKEN_IDS:
            self.largest = max(self.largest, int(np.maximum.reduce(_values(column, _UINT32))))
        elif self.kind is ColumnKind.ROUTING:
            if column.encoding:
                values = codec.unpacked_planes(column)
            else:
                values = _values(column, _UINT8 if column.dtype == _UINT8_NUMBER else _UINT16)
            self.largest = max(self.largest, int(values.max()))


def _values(column: WireColumn, dtype: np.dtype[Any]) -> Array:
    """All values of a column in one row, where they lie."""
    return np.frombuffer(column.buffer, dtype, column.size_bytes // dtype.itemsize, column.offset)


def _all(n: int) -> list[tuple[int, int]]:
    return [(0, n)] if n else []
