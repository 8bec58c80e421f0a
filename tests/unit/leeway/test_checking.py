"""A trajectory is judged chunk by chunk exactly as it is when it is assembled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from leeway import codec
from leeway.codec.fields import leading_columns
from leeway.errors import CorruptDataError, InvalidDataError
from leeway.trajectory.assembly import assemble_trajectory, check_against_spec
from leeway.trajectory.check import TrajectoryCheck
from leeway.types import (
    Column,
    ColumnKind,
    RunSpec,
    SamplingParams,
    Segment,
    SegmentKind,
    TrajectoryChunk,
    TrajectoryClose,
    TrajectoryRecord,
    VersionSpan,
)
from leeway.v1 import common_pb2, trajectory_pb2
from tests.harness.replay_builders import ROOT, SIGNATURE, close, spec, version

SPEC = replace(
    spec(),
    signature=replace(SIGNATURE, moe_layers=2, experts=4, experts_per_token=1),
    sampling=SamplingParams(max_tokens=16, topk=2, routing=True),
)
PROMPT, TOKENS = 2, 9


def parts(cuts: list[int]) -> list[TrajectoryChunk]:
    """A trajectory with every column, cut into chunks at these tokens."""
    bounds = [0, *sorted({cut for cut in cuts if PROMPT < cut < TOKENS}), TOKENS]
    made: list[TrajectoryChunk] = []
    for begin, end in pairwise(bounds):
        first = max(begin, PROMPT)
        last_row = min(end, TOKENS - 1)
        sampled = end - first
        made.append(
            TrajectoryChunk(
                columns=(
                    Column(ColumnKind.TOKEN_IDS, begin, end, np.arange(begin, end, dtype=np.int32)),
                    Column(ColumnKind.BEHAVIOR_LOGPROBS, first, end, np.full(sampled, -0.5, np.float32)),
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


def pack(column: common_pb2.Column, damage: int = 0) -> None:
    """Routing in its packed form, though it be larger; perhaps with another expert, or bytes that are none."""
    try:
        ids = codec.array_from_proto(column.values).transpose(1, 0, 2) + 3 * (damage == 1)
    except InvalidDataError:
        return  # spoiled in another way, or packed already
    frame = zstandard.ZstdCompressor().compress(ids.astype(np.uint8).tobytes())
    column.values.data = b"\x08" + (frame[:-1] if damage == 2 else frame)
    column.encoding = common_pb2.COLUMN_ENCODING_PACKED_ROUTING


def assembled(chunks: list[bytes], ending: TrajectoryClose, run_spec: RunSpec) -> bool:
    try:
        trajectory = assemble_trajectory(TrajectoryRecord("t", 0, 1, "s0", ending, "", tuple(chunks)))
        check_against_spec(trajectory, run_spec, run_spec.sampling)
    except (InvalidDataError, CorruptDataError):
        return False
    return bool(trajectory.version_spans)


def checked(chunks: list[bytes], ending: TrajectoryClose, run_spec: RunSpec) -> bool:
    check = TrajectoryCheck(run_spec.run)
    for chunk in chunks:
        check.add(chunk)
    try:
        check.check(ending, run_spec, run_spec.sampling)
    except (InvalidDataError, CorruptDataError):
        return False
    return True


def ways_to_spoil() -> list[Callable[[trajectory_pb2.TrajectoryChunk, int], None]]:
    def column(message: trajectory_pb2.TrajectoryChunk, number: int) -> None:
        del message.columns[number % len(message.columns)]

    def copied_column(message: trajectory_pb2.TrajectoryChunk, number: int) -> None:
        message.columns.add().CopyFrom(message.columns[number % len(message.columns)])

    def place(message: trajectory_pb2.TrajectoryChunk, number: int) -> None:
        one = message.columns[number % len(message.columns)]
        one.start_token, one.end_token = one.start_token + 1, one.end_token + 1

    def length(message: trajectory_pb2.TrajectoryChunk, number: int) -> None:
        message.columns[number % len(message.columns)].end_token += 1

    def data(message: trajectory_pb2.TrajectoryChunk, number: int) -> None:
        values = message.columns[number % len(message.columns)].values
        values.data = bytes(255 - byte for byte in values.data)

    def dtype(message: trajectory_pb2.TrajectoryChunk, number: int) -> None:
        message.columns[number % len(message.columns)].values.dtype = number % 10  # type: ignore[assignment]

    def shape(message: trajectory_pb2.TrajectoryChunk, number: int) -> None:
        message.columns[number % len(message.columns)].values.shape.append(1)

    def kind(message: trajectory_pb2.TrajectoryChunk, number: int) -> None:
        message.columns[number % len(message.columns)].kind = number % 8  # type: ignore[assignment]

    def encoding(message: trajectory_pb2.TrajectoryChunk, number: int) -> None:
        message.columns[number % len(message.columns)].encoding = number % 3  # type: ignore[assignment]

    def packed(message: trajectory_pb2.TrajectoryChunk, number: int) -> None:
        for one in message.columns:
            if one.kind == ColumnKind.ROUTING and len(one.values.shape) == 3:
                pack(one, damage=number % 3)

    def segment(message: trajectory_pb2.TrajectoryChunk, number: int) -> None:
        message.segments[number % 2].end_token += 1

    def segment_kind(message: trajectory_pb2.TrajectoryChunk, number: int) -> None:
        message.segments[1].kind = number % 5  # type: ignore[assignment]

    def temperature(message: trajectory_pb2.TrajectoryChunk, number: int) -> None:
        message.segments[1].sampling.temperature = 0.0

    def span(message: trajectory_pb2.TrajectoryChunk, number: int) -> None:
        for one in message.version_spans:
            one.end_token += 1 + number % 2

    def no_span(message: trajectory_pb2.TrajectoryChunk, number: int) -> None:
        message.ClearField("version_spans")

    def run(message: trajectory_pb2.TrajectoryChunk, number: int) -> None:
        for one in message.version_spans:
            one.version.CopyFrom(codec.version_to_proto(version(0, 0, "other-run")))

    def digest(message: trajectory_pb2.TrajectoryChunk, number: int) -> None:
        for one in message.version_spans:
            one.version.digest = b"short"

    def nothing(message: trajectory_pb2.TrajectoryChunk, number: int) -> None:
        del message, number

    ways: list[Any] = list(locals().values())
    return ways


@settings(max_examples=400, deadline=None)
@given(
    cuts=st.lists(st.integers(0, TOKENS), max_size=3),
    spoils=st.lists(st.tuples(st.sampled_from(ways_to_spoil()), st.integers(0, 9), st.integers(0, 9)), max_size=2),
    shuffled=st.permutations(range(4)),
    extra_tokens=st.sampled_from([0, 0, 0, 1, -1]),
    columns_last=st.booleans(),
    packs=st.booleans(),
    wanted=st.sampled_from([SPEC.sampling, SamplingParams(max_tokens=16), SamplingParams(max_tokens=16, topk=3)]),
)
def test_both_ways_to_check_agree(
    cuts: list[int],
    spoils: list[tuple[Callable[[trajectory_pb2.TrajectoryChunk, int], None], int, int]],
    shuffled: list[int],
    extra_tokens: int,
    columns_last: bool,
    packs: bool,
    wanted: SamplingParams,
) -> None:
    made = [codec.chunk_to_proto(chunk) for chunk in parts(cuts)]
    for column in (column for message in made for column in message.columns if packs and column.kind == 5):
        if column.values.shape[0]:
            pack(column)
    for spoil, which, number in spoils:
        spoil(made[which % len(made)], number)
    made = [made[place] for place in shuffled if place < len(made)]
    chunks = [_reordered(message) if columns_last else message.SerializeToString() for message in made]
    run_spec = replace(SPEC, sampling=wanted)
    ending = close(chunks, token_count=TOKENS + extra_tokens)
    assert checked(chunks, ending, run_spec) is assembled(chunks, ending, run_spec)
    if not spoils and not extra_tokens and wanted.topk < 3 and shuffled == sorted(shuffled):
        assert checked(chunks, ending, run_spec)


def _reordered(message: trajectory_pb2.TrajectoryChunk) -> bytes:
    """The same message, encoded in another order, with a column's fields backwards."""
    tail = trajectory_pb2.TrajectoryChunk(segments=message.segments, version_spans=message.version_spans)
    data = tail.SerializeToString()
    for column in message.columns:
        values = type(column)(values=column.values).SerializeToString()
        column.ClearField("values")
        inner = values + column.SerializeToString()
        data += b"\x0a" + codec.varint(len(inner)) + inner
    return data


def test_a_close_that_seals_other_chunks_is_refused() -> None:
    chunks = [codec.encode_chunk(chunk) for chunk in parts([4])]
    check = TrajectoryCheck(SPEC.run)
    for chunk in chunks:
        check.add(chunk)
    check.check(close(chunks, token_count=TOKENS), SPEC, SPEC.sampling)
    for others in (chunks[:1], chunks[::-1]):
        with pytest.raises(CorruptDataError, match="not what its close sealed"):
            check.check(close(others, token_count=TOKENS), SPEC, SPEC.sampling)


def test_a_number_that_protobuf_finds_too_long_is_left_to_it() -> None:
    chunk = b"\x0a\x16\x08\x81" + b"\x80" * 9 + b"\x00\x22\x08\x08\x01\x12\x01\x01\x1a\x01\x00"
    assert leading_columns(chunk) == ([], 0)
    with pytest.raises(InvalidDataError):
        TrajectoryCheck(SPEC.run).add(chunk)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_columns_found_on_the_wire_are_those_that_protobuf_finds(data: st.DataObject) -> None:
    made = codec.chunk_to_proto(parts([data.draw(st.integers(0, TOKENS))])[0])
    if data.draw(st.booleans()):
        pack(made.columns[4])
    chunk = bytearray(made.SerializeToString())
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, len(chunk) - 1))
        chunk[place : place + data.draw(st.integers(0, 1))] = data.draw(st.binary(max_size=12) | st.just(b"\x80" * 10))
    whole = bytes(chunk[: data.draw(st.integers(0, len(chunk)))])
    columns, end = leading_columns(whole)
    try:
        expected = codec.parse(trajectory_pb2.TrajectoryChunk, whole)
    except InvalidDataError:
        with pytest.raises(InvalidDataError):
            codec.parse(trajectory_pb2.TrajectoryChunk, whole[end:])
        return
    found = [(*one[:5], one.buffer[one.offset :][: one.size_bytes], one.encoding) for one in columns]
    rest = codec.parse(trajectory_pb2.TrajectoryChunk, whole[end:])
    found += [_fields(column) for column in rest.columns]
    assert found == [_fields(column) for column in expected.columns]
    assert (rest.segments, rest.version_spans) == (expected.segments, expected.version_spans)


def _fields(column: object) -> tuple[object, ...]:
    assert isinstance(column, type(trajectory_pb2.TrajectoryChunk().columns.add()))
    values = column.values
    place = column.kind, column.start_token, column.end_token
    return *place, values.dtype, tuple(values.shape), values.data, column.encoding
