"""The one judge of a trajectory: chunk by chunk, so that what its end needs of a long one fits into a few numbers.

    add     a serialized chunk: its digest, then `take`      what cannot be decoded is remembered and refused at the end
    take    a decoded chunk
    whole   the columns, segments and version spans fit together
    check   `whole`, and the close seals these chunks, and they are what the run asks for

The replay buffer runs `check` when a trajectory closes. `assembly` runs `whole` before it joins what was drawn, so what
the buffer calls READY assembles everywhere.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

from leeway import codec
from leeway.errors import CorruptDataError, InvalidDataError
from leeway.types import (
    Column,
    ColumnKind,
    PolicyVersion,
    RunSpec,
    SamplingParams,
    Segment,
    SegmentKind,
    TrajectoryChunk,
    TrajectoryClose,
)
from leeway.v1 import trajectory_pb2

LARGEST_LOGPROB: Final = 1e-4
"""Log-probabilities are at most 0, up to an engine's rounding in float32."""
LARGEST_MASS: Final = 1 + 1e-3
"""The probabilities of the candidates of one token add up to at most 1, up to the same."""

_INT32, _FLOAT32, _UINT8, _UINT16 = map(np.dtype, ("int32", "float32", "uint8", "uint16"))
_LAYOUT: Final = {
    ColumnKind.TOKEN_IDS: (1, (_INT32,)),
    ColumnKind.BEHAVIOR_LOGPROBS: (1, (_FLOAT32,)),
    ColumnKind.TOPK_TOKEN_IDS: (2, (_INT32,)),
    ColumnKind.TOPK_LOGPROBS: (2, (_FLOAT32,)),
    ColumnKind.ROUTING: (3, (_UINT8, _UINT16)),
}
"""Axes and element types of each column."""

Range = tuple[int, int]
"""Tokens [start, end)."""


class Whole(NamedTuple):
    """A trajectory whose parts fit together: its segments, and the tokens that were sampled."""

    segments: tuple[Segment, ...]
    sampled: list[Range]


class TrajectoryCheck:
    """State of the judgement of one trajectory; chunks are not kept."""

    __slots__ = ("_columns", "_problem", "_segments", "_spans", "_versions", "digest", "num_chunks")

    def __init__(self) -> None:
        self.digest = codec.EMPTY_CHAIN
        self.num_chunks = 0
        self._versions: dict[PolicyVersion, None] = {}
        self._problem = ""  # the first chunk that does not decode says why
        self._columns: dict[ColumnKind, _Column] = {}
        self._segments: dict[int, Segment] = {}  # by start; the latest counts
        self._spans = Ranges()

    def add(self, data: bytes) -> tuple[PolicyVersion, ...]:
        """Take a serialized chunk over; returns the versions that its spans name, each once.

        Raises:
            InvalidDataError: the bytes are not a TrajectoryChunk; nothing is taken over.
        """
        message = codec.parse(trajectory_pb2.TrajectoryChunk, data)
        self.digest = codec.chain_digest(self.digest, data)
        self.num_chunks += 1
        try:
            chunk = codec.chunk_from_proto(message)
        except InvalidDataError as error:
            self._problem = self._problem or error.message
            return codec.span_versions(message)
        self.take(chunk)
        return tuple({span.version: None for span in chunk.version_spans})

    def take(self, chunk: TrajectoryChunk) -> None:
        """Take a decoded chunk over."""
        for column in chunk.columns:
            known = self._columns.get(column.kind)
            if known is None:
                known = self._columns[column.kind] = _Column(column)
            known.add(column)
        for segment in chunk.segments:
            self._segments[segment.start_token] = segment
        for span in chunk.version_spans:
            self._versions[span.version] = None
            self._spans.add(span.start_token, span.end_token)

    def check(self, close: TrajectoryClose, spec: RunSpec, sampling: SamplingParams) -> None:
        """Judge the trajectory that a close ends.

        Raises:
            CorruptDataError: the close seals other chunks.
            InvalidDataError: saying what is wrong.
        """
        n = close.token_count
        if n > spec.signature.context_length:
            raise InvalidDataError(f"{n} tokens exceed the model's context of {spec.signature.context_length}")
        if self.digest != close.digest or self.num_chunks != close.chunk_count:
            raise CorruptDataError("its chunks are not what its close sealed")
        if not self.whole(n).sampled:
            raise InvalidDataError("no token was sampled")
        self._check_run(spec, sampling)

    def whole(self, n: int) -> Whole:
        """Judge everything that needs no knowledge of the run: `n` tokens have come, each with all that belongs to it.

        Raises:
            InvalidDataError: gaps, overlaps, missing behavior log-probs or spans, non-finite log-probs.
        """
        if self._problem:
            raise InvalidDataError(self._problem)
        segments, sampled = self._in_order(n)
        if self._spans.within(n, "version span") != sampled:
            raise InvalidDataError("version spans must cover exactly the sampled tokens")
        if self._covered(ColumnKind.TOKEN_IDS, n) != _all(n):
            raise InvalidDataError("token ids are missing")
        if self._covered(ColumnKind.BEHAVIOR_LOGPROBS, n) != sampled:
            raise InvalidDataError("behavior log-probs must cover exactly the sampled tokens; mu is never recomputed")
        if not self._columns[ColumnKind.BEHAVIOR_LOGPROBS].finite:
            raise InvalidDataError("a behavior log-prob is not a finite number of at most 0")
        rows = max(n - 1, 0)
        if self._covered(ColumnKind.ROUTING, rows) not in (None, _all(rows)):
            raise InvalidDataError("routing must cover every token but the last")
        topk = [self._covered(kind, n) for kind in (ColumnKind.TOPK_TOKEN_IDS, ColumnKind.TOPK_LOGPROBS)]
        if topk.count(None) == 1:
            raise InvalidDataError("top-K token ids and log-probs come together")
        if topk not in ([None, None], [sampled, sampled]):
            raise InvalidDataError("top-K columns must cover exactly the sampled tokens")
        return Whole(segments, sampled)

    def _check_run(self, spec: RunSpec, sampling: SamplingParams) -> None:
        signature = spec.signature
        if self._columns[ColumnKind.TOKEN_IDS].largest >= signature.vocab_size:
            raise InvalidDataError(f"a token id is outside the vocabulary of {signature.vocab_size}")
        for version in self._versions:
            if version.run != spec.run:
                raise InvalidDataError(f"tokens are labelled with {version}, a version of another run")
        routing, topk = self._columns.get(ColumnKind.ROUTING), self._columns.get(ColumnKind.TOPK_TOKEN_IDS)
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

    def _in_order(self, n: int) -> Whole:
        """Segments that cover all tokens without a gap, and what was sampled."""
        segments = tuple(segment for _, segment in sorted(self._segments.items()))
        sampled = Ranges()
        at = 0
        for segment in segments:
            if segment.start_token != at:
                raise InvalidDataError(f"segments leave a gap or overlap at token {at}")
            at = segment.end_token
            if segment.kind is SegmentKind.MODEL:
                sampled.add(segment.start_token, at)
        if at != n:
            raise InvalidDataError(f"segments cover {at} tokens of {n}")
        return Whole(segments, sampled.within(n, "segment"))

    def _covered(self, kind: ColumnKind, n: int) -> list[Range] | None:
        """The tokens that have values of a kind; None when nothing of it came."""
        column = self._columns.get(kind)
        if column is None:
            return None
        if column.problem:
            raise InvalidDataError(column.problem)
        return column.ranges.within(n, kind.name)


class Ranges:
    """Tokens as ranges, merged as they grow."""

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

    def within(self, n: int, name: str) -> list[Range]:
        """All of them, in order and merged.

        Raises:
            InvalidDataError: two overlap, or one ends beyond n.
        """
        if self._reach > n:
            raise InvalidDataError(f"{name} ends at token {self._reach}: it exceeds {n} tokens")
        merged: list[Range] = []
        for start, end in sorted(self._ranges):
            if merged and start < merged[-1][1]:
                raise InvalidDataError(f"{name} [{start}, {end}) overlaps another")
            if merged and start == merged[-1][1]:
                merged[-1] = merged[-1][0], end
            else:
                merged.append((start, end))
        return merged


class _Column:
    """All values of one kind so far: which tokens have them, and the extremes that matter."""

    __slots__ = ("_dtype", "finite", "kind", "largest", "problem", "ranges", "row")

    def __init__(self, first: Column) -> None:
        self.kind = first.kind
        self.ranges = Ranges()
        self.problem = ""
        self.row = first.values.shape[1:]  # shape of one token's values
        self.largest = -1  # of ids and experts; negative ids count as huge
        self.finite = True
        self._dtype = first.values.dtype
        ndim, dtypes = _LAYOUT[self.kind]
        if first.values.ndim != ndim or self._dtype not in dtypes:
            self.problem = (
                f"{self.kind.name} must be {' or '.join(map(str, dtypes))} with {ndim} axes, "
                f"but is {self._dtype.name} with {first.values.ndim}"
            )

    def add(self, column: Column) -> None:
        """Take values over."""
        values = column.values
        if values.dtype != self._dtype or values.shape[1:] != self.row:
            self.problem = self.problem or f"{self.kind.name} changes its type or shape between chunks"
        if self.problem:
            return
        self.ranges.add(column.start_token, column.end_token)
        if not values.size:
            return
        if self.kind is ColumnKind.BEHAVIOR_LOGPROBS:
            # NaN is the minimum and the maximum of what contains it, and no comparison with it holds.
            if not (np.minimum.reduce(values) > -np.inf and np.maximum.reduce(values) <= LARGEST_LOGPROB):
                self.finite = False
        elif self.kind is ColumnKind.TOKEN_IDS:
            self.largest = max(self.largest, int(np.maximum.reduce(values.view(np.uint32))))
        elif self.kind is ColumnKind.ROUTING:
            self.largest = max(self.largest, int(values.max()))


def _all(n: int) -> list[Range]:
    return [(0, n)] if n else []
