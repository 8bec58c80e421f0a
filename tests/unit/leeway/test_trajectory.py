"""One judge: what it accepts is assembled on one token axis, and what it refuses is refused with its reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from leeway import codec
from leeway.errors import CorruptDataError, InvalidDataError
from leeway.trajectory.assembly import assemble_trajectory
from leeway.trajectory.check import TrajectoryCheck
from leeway.types import (
    Column,
    ColumnKind,
    RunSpec,
    SamplingParams,
    Segment,
    SegmentKind,
    Trajectory,
    TrajectoryChunk,
    TrajectoryClose,
    TrajectoryRecord,
    VersionSpan,
)
from leeway.v1 import common_pb2, trajectory_pb2
from tests.harness.replay_builders import ROOT, SIGNATURE, close, spec, version

PROMPT, TOKENS = 2, 9
SPEC = replace(
    spec(),
    signature=replace(SIGNATURE, moe_layers=2, experts=4, experts_per_token=1),
    sampling=SamplingParams(max_tokens=16, topk=2, routing=True),
)
MU = np.linspace(-1, 1e-5, TOKENS, dtype=np.float32)

Chunk = trajectory_pb2.TrajectoryChunk
Spoil = Callable[[list[Chunk]], object]


def parts(cuts: Iterable[int] = ()) -> list[TrajectoryChunk]:
    """A trajectory with every column, cut into chunks at these tokens."""
    bounds = [0, *sorted({cut for cut in cuts if PROMPT < cut < TOKENS}), TOKENS]
    made: list[TrajectoryChunk] = []
    for begin, end in pairwise(bounds):
        first, last_row = max(begin, PROMPT), min(end, TOKENS - 1)
        sampled = end - first
        made.append(
            TrajectoryChunk(
                columns=(
                    Column(ColumnKind.TOKEN_IDS, begin, end, np.arange(begin, end, dtype=np.int32)),
                    Column(ColumnKind.BEHAVIOR_LOGPROBS, first, end, MU[first:end]),
                    Column(ColumnKind.TOPK_TOKEN_IDS, first, end, np.ones((sampled, 2), np.int32)),
                    Column(ColumnKind.TOPK_LOGPROBS, first, end, np.full((sampled, 2), -1, np.float32)),
                    Column(ColumnKind.ROUTING, begin, last_row, np.ones((last_row - begin, 2, 1), np.uint8)),
                ),
                segments=(
                    Segment(SegmentKind.PROMPT, 0, PROMPT),
                    Segment(SegmentKind.MODEL, PROMPT, end, True, SamplingParams(), "fake/1"),
                ),
                version_spans=(VersionSpan(first, end, ROOT),),
            )
        )
    return made


def messages(cuts: Iterable[int] = ()) -> list[Chunk]:
    return [codec.chunk_to_proto(chunk) for chunk in parts(cuts)]


def pack(column: common_pb2.Column) -> None:
    """Routing in its packed form, though it be larger."""
    ids = codec.array_from_proto(column.values).transpose(1, 0, 2)
    column.values.data = b"\x08" + zstandard.ZstdCompressor().compress(ids.tobytes())
    column.encoding = common_pb2.COLUMN_ENCODING_PACKED_ROUTING


def backwards(message: Chunk) -> bytes:
    """The same message, its fields and those of its columns in another order than they are written in."""
    data = Chunk(segments=message.segments, version_spans=message.version_spans).SerializeToString()
    for column in message.columns:
        values = type(column)(values=column.values).SerializeToString()
        column.ClearField("values")
        inner = values + column.SerializeToString()
        data += b"\x0a" + codec.varint(len(inner)) + inner
    return data


def judge(chunks: Sequence[bytes], ending: TrajectoryClose, run_spec: RunSpec = SPEC) -> None:
    check = TrajectoryCheck()
    for chunk in chunks:
        check.add(chunk)
    check.check(ending, run_spec, run_spec.sampling)


def assemble(chunks: Sequence[bytes], ending: TrajectoryClose | None) -> Trajectory:
    return assemble_trajectory(TrajectoryRecord("t", 0, 1, "s0", ending, "", tuple(chunks)))


@settings(max_examples=200, deadline=None)
@given(
    cuts=st.lists(st.integers(0, TOKENS), max_size=3), packed=st.booleans(), reordered=st.booleans(), late=st.booleans()
)
def test_what_is_whole_is_assembled_however_it_came(cuts: list[int], packed: bool, reordered: bool, late: bool) -> None:
    made = messages(cuts)
    for column in (column for message in made for column in message.columns if column.kind == ColumnKind.ROUTING):
        if packed and column.values.shape[0]:
            pack(column)
    if late:  # as engines that send routing in one piece at the end
        for message in made[:-1]:
            made[-1].columns.append(message.columns.pop())
    chunks = [backwards(message) if reordered else message.SerializeToString() for message in made]
    ending = close(chunks, token_count=TOKENS)
    judge(chunks, ending)
    trajectory = assemble(chunks, ending)
    sampled = np.arange(TOKENS) >= PROMPT
    np.testing.assert_array_equal(trajectory.token_ids, np.arange(TOKENS))
    np.testing.assert_array_equal(trajectory.loss_mask, sampled)
    np.testing.assert_array_equal(trajectory.behavior_logprobs, MU * sampled)
    assert trajectory.topk_token_ids is not None
    assert trajectory.topk_logprobs is not None
    assert trajectory.routing is not None
    np.testing.assert_array_equal(trajectory.topk_token_ids, np.outer(sampled, [1, 1]))
    np.testing.assert_array_equal(trajectory.topk_logprobs, -np.outer(sampled, [1, 1]))
    np.testing.assert_array_equal(trajectory.routing, np.ones((TOKENS - 1, 2, 1)))
    assert trajectory.segments == (Segment(SegmentKind.PROMPT, 0, PROMPT), parts()[0].segments[1])
    assert {span.version for span in trajectory.version_spans} == {ROOT}


def values(kind: ColumnKind, array: np.ndarray) -> Spoil:
    """The last chunk's column of a kind with other values."""

    def spoil(made: list[Chunk]) -> None:
        for column in made[-1].columns:
            if column.kind == kind:
                column.values.CopyFrom(codec.array_to_proto(array))

    return spoil


def without(*kinds: ColumnKind) -> Spoil:
    def spoil(made: list[Chunk]) -> None:
        for message in made:
            kept = [column for column in message.columns if column.kind not in kinds]
            del message.columns[:]
            message.columns.extend(kept)

    return spoil


def column(place: int, **changes: object) -> Spoil:
    """A column of the last chunk with other fields; the places are those of `parts`."""

    def spoil(made: list[Chunk]) -> None:
        made[-1].columns[place].MergeFrom(common_pb2.Column(**changes))  # type: ignore[arg-type]

    return spoil


def mu(*last: float, dtype: type = np.float32) -> Spoil:
    return values(ColumnKind.BEHAVIOR_LOGPROBS, np.array(last, dtype))


def each_span(change: Callable[[common_pb2.VersionSpan], object]) -> Spoil:
    return lambda made: [change(span) for message in made for span in message.version_spans]


def set_sampling(made: list[Chunk]) -> None:
    made[-1].segments[1].sampling.temperature = 0.0


def other_run(span: common_pb2.VersionSpan) -> None:
    span.version.CopyFrom(codec.version_to_proto(version(0, 0, "other-run")))


def rows(*shape: int, fill: int = 1, dtype: type = np.uint8) -> np.ndarray:
    return np.full(shape, fill, dtype)


CUT = 6  # the last chunk has tokens 6, 7 and 8
UNFIT: dict[str, Spoil] = {
    "behavior log-probs must cover exactly": without(ColumnKind.BEHAVIOR_LOGPROBS),
    "token ids are missing": without(ColumnKind.TOKEN_IDS),
    "log-prob is not a finite number of at most 0": mu(-1, np.nan, 0),
    "not a finite number of at most 0": mu(-1, -np.inf, 0),
    "number of at most 0": mu(-1, 2e-4, 0),
    "BEHAVIOR_LOGPROBS changes its type": mu(-1, -1, 0, dtype=np.float64),
    "ROUTING changes its type or shape": values(ColumnKind.ROUTING, rows(2, 3, 1)),
    "segments cover 6 tokens of 9": lambda made: made.pop(),
    "segments cover 10 tokens of 9": lambda made: setattr(made[-1].segments[1], "end_token", TOKENS + 1),
    "segments leave a gap or overlap at token 3": lambda made: [
        setattr(message.segments[0], "end_token", 3) for message in made
    ],
    "overlaps another": lambda made: made.append(made[-1]),
    "ends at token 12: it exceeds 9": column(0, start_token=9, end_token=12),
    "covers tokens": column(0, end_token=TOKENS + 1),
    "tensor of shape": lambda made: made[-1].columns[0].values.shape.append(2),
    "tensor of shape \\[3\\]": lambda made: setattr(made[-1].columns[0].values, "data", b"short"),
    "is not a ColumnKind": column(0, kind=9),
    "not in leeway.v1.DataType": lambda made: setattr(made[-1].columns[0].values, "dtype", 99),
    "bfloat16 arrays are only allowed": lambda made: setattr(made[-1].columns[0].values, "dtype", 6),
    "cannot have encoding": column(0, encoding=1),
    "packed routing": column(4, encoding=1),
    "routing must cover every token but the last": lambda made: made[0].columns.pop(),
    "top-K token ids and log-probs come together": without(ColumnKind.TOPK_LOGPROBS),
    "top-K columns must cover exactly": lambda made: [made[-1].columns.pop(place) for place in (3, 2)],
    "version spans must cover exactly": lambda made: made[-1].ClearField("version_spans"),
    "version span ends at token 10": lambda made: setattr(made[-1].version_spans[0], "end_token", TOKENS + 1),
    "version span .* is empty": lambda made: setattr(made[-1].version_spans[0], "end_token", CUT),
    "32-byte digest": each_span(lambda span: setattr(span.version, "digest", b"short")),
    "needs a run": each_span(lambda span: setattr(span.version, "run", "")),
    "is not a SegmentKind": lambda made: setattr(made[-1].segments[1], "kind", 9),
    "cannot be in the loss": lambda made: setattr(made[-1].segments[0], "in_loss", True),
    "before its start": lambda made: setattr(made[-1].segments[1], "end_token", 1),
    "temperature must be": set_sampling,
}
UNFIT_FIRST: dict[str, Spoil] = {
    "TOKEN_IDS must be int32 with 1 axes, but is int64": values(ColumnKind.TOKEN_IDS, np.arange(TOKENS)),
    "ROUTING must be uint8 or uint16 with 3": values(ColumnKind.ROUTING, rows(TOKENS - 1, 2)),
    "TOPK_LOGPROBS must be float32": values(ColumnKind.TOPK_LOGPROBS, rows(7, 2, dtype=np.float64)),
}
WRONG_FOR_RUN: dict[str, Spoil] = {
    "outside the vocabulary of 64": values(ColumnKind.TOKEN_IDS, np.array([1, 64, 1], np.int32)),
    "outside the vocabulary": values(ColumnKind.TOKEN_IDS, np.array([1, -1, 1], np.int32)),
    "a version of another run": each_span(other_run),
    "names an expert beyond the model's 4": values(ColumnKind.ROUTING, rows(2, 2, 1, fill=4)),
    "records routing, but none came": without(ColumnKind.ROUTING),
    "records top-2, but fewer": without(ColumnKind.TOPK_TOKEN_IDS, ColumnKind.TOPK_LOGPROBS),
}


def spoiled(spoil: Spoil, cuts: Iterable[int]) -> tuple[list[bytes], TrajectoryClose]:
    made = messages(cuts)
    spoil(made)
    chunks = [message.SerializeToString() for message in made]
    return chunks, close(chunks, token_count=TOKENS)


@pytest.mark.parametrize(
    ("reason", "spoil", "cuts"),
    [*((*case, (CUT,)) for case in UNFIT.items()), *((*case, ()) for case in UNFIT_FIRST.items())],
)
def test_what_does_not_fit_together_is_refused_by_reason(reason: str, spoil: Spoil, cuts: Iterable[int]) -> None:
    chunks, ending = spoiled(spoil, cuts)
    with pytest.raises(InvalidDataError, match=reason):
        judge(chunks, ending)
    with pytest.raises(InvalidDataError, match=f"trajectory t: .*{reason}"):
        assemble(chunks, ending)


@pytest.mark.parametrize(("reason", "spoil"), WRONG_FOR_RUN.items())
def test_what_the_run_did_not_ask_for_is_refused_by_reason(reason: str, spoil: Spoil) -> None:
    chunks, ending = spoiled(spoil, (CUT,))
    assemble(chunks, ending)
    with pytest.raises(InvalidDataError, match=reason):
        judge(chunks, ending)


def test_what_exceeds_the_model_is_refused() -> None:
    chunks, ending = spoiled(lambda _: None, ())
    for changes, reason in (
        ({"context_length": TOKENS - 1}, "9 tokens exceed the model's context of 8"),
        ({"moe_layers": 3}, "routing has 2 layers x 1 experts per token; the model has 3 x 1"),
    ):
        with pytest.raises(InvalidDataError, match=reason):
            judge(chunks, ending, replace(SPEC, signature=replace(SPEC.signature, **changes)))
    with pytest.raises(InvalidDataError, match="top-3, but fewer"):
        judge(chunks, ending, replace(SPEC, sampling=SamplingParams(topk=3)))
    prompt = codec.encode_chunk(
        TrajectoryChunk(
            (
                Column(ColumnKind.TOKEN_IDS, 0, 2, np.ones(2, np.int32)),
                Column(ColumnKind.BEHAVIOR_LOGPROBS, 2, 2, np.ones(0, np.float32)),
            ),
            (Segment(SegmentKind.PROMPT, 0, 2),),
        )
    )
    with pytest.raises(InvalidDataError, match="no token was sampled"):
        judge([prompt], close([prompt], token_count=2), spec())


def test_a_close_that_seals_other_chunks_is_refused() -> None:
    chunks, ending = spoiled(lambda _: None, (4,))
    flipped = bytes([*chunks[1][:-1], chunks[1][-1] ^ 1])
    for others in (chunks[:1], chunks[::-1], [chunks[0], flipped], [*chunks, chunks[1]]):
        with pytest.raises(CorruptDataError, match="not what its close sealed"):
            judge(others, ending)
        with pytest.raises(CorruptDataError, match="trajectory t: its chunks are not what its close sealed"):
            assemble(others, ending)
    with pytest.raises(InvalidDataError, match="trajectory t is not closed"):
        assemble(chunks, None)


def test_bytes_that_are_no_chunk_leave_no_trace() -> None:
    chunks, ending = spoiled(lambda _: None, (4,))
    check = TrajectoryCheck()
    assert check.add(chunks[0]) == (ROOT,)
    for damaged in (b"\xff\xff", chunks[1][:-1], b"\x0a\x16\x08\x81" + b"\x80" * 9 + b"\x00"):
        with pytest.raises(InvalidDataError, match="not a TrajectoryChunk"):
            check.add(damaged)
    check.add(chunks[1])
    check.check(ending, SPEC, SPEC.sampling)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_what_is_accepted_assembles_whatever_was_damaged(data: st.DataObject) -> None:
    chunks = [bytearray(message.SerializeToString()) for message in messages([4])]
    for _ in range(data.draw(st.integers(1, 3))):
        chunk = data.draw(st.sampled_from(chunks))
        at = data.draw(st.integers(0, len(chunk) - 1))
        chunk[at : at + data.draw(st.integers(0, 1))] = data.draw(st.binary(max_size=3) | st.just(b"\x80" * 10))
    sent = [bytes(chunk) for chunk in chunks]
    ending = close(sent, token_count=TOKENS)
    accepted = False
    with suppress(InvalidDataError):
        judge(sent, ending)
        accepted = True
    if accepted:
        assert assemble(sent, ending).num_tokens == TOKENS
