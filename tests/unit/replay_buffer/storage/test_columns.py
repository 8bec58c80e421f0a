"""Columns on demand: what nobody asks for is not read."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leeway import codec
from leeway.errors import CorruptDataError, InvalidDataError, NotFoundError
from leeway.types import Column, ColumnKind, Segment, SegmentKind, TrajectoryChunk, VersionSpan
from replay_buffer.rules.transitions import ChunkWritten
from replay_buffer.storage.records import Record, encode
from replay_buffer.storage.segment_reader import ColumnReader
from replay_buffer.storage.segments import HEADER, Location, frame, segment_path
from tests.harness.replay_builders import ROOT, RUN

TOKENS = 2000


def a_chunk(num_tokens: int = TOKENS) -> TrajectoryChunk:
    random = np.random.default_rng(0)
    logprobs = -random.random(num_tokens, np.float32)
    routing = random.integers(0, 64, (num_tokens, 24, 8)).astype(np.uint8)
    return TrajectoryChunk(
        columns=(
            Column(ColumnKind.ROUTING, 0, num_tokens, routing),
            Column(ColumnKind.TOKEN_IDS, 0, num_tokens, np.arange(num_tokens, dtype=np.int32)),
            Column(ColumnKind.BEHAVIOR_LOGPROBS, 0, num_tokens, logprobs),
        ),
        segments=(Segment(SegmentKind.MODEL, 0, num_tokens, True, None, "fake/1"),),
        version_spans=(VersionSpan(0, num_tokens, ROOT),),
    )


def stored(directory: Path, chunk: bytes) -> Location:
    payload = b"".join(encode(Record(RUN, 1, ChunkWritten(f"{RUN}-g1.0", 1, 0, chunk, ()))))
    segment_path(directory, 1).write_bytes(frame(b"before") + frame(payload) + frame(b"after"))
    return Location(1, len(frame(b"before")) + HEADER.size, len(payload))


def test_only_the_columns_that_are_asked_for_are_read(tmp_path: Path) -> None:
    whole = a_chunk()
    location = stored(tmp_path, codec.encode_chunk(whole))
    reader = ColumnReader(tmp_path)
    chunk = reader.read(location, {ColumnKind.BEHAVIOR_LOGPROBS})
    (column,) = chunk.columns
    np.testing.assert_array_equal(column.values, whole.columns[2].values)
    assert (chunk.segments, chunk.version_spans) == (whole.segments, whole.version_spans)
    assert TOKENS * 4 < reader.read_bytes < TOKENS * 4 + 4096 < location.size_bytes / 20


@settings(max_examples=50, deadline=None, derandomize=True)
@given(kinds=st.sets(st.sampled_from(list(ColumnKind))), num_tokens=st.integers(1, 400))
def test_what_is_read_is_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, kinds: set[ColumnKind], num_tokens: int
) -> None:
    directory = tmp_path_factory.mktemp("log")
    whole = a_chunk(num_tokens)
    chunk = ColumnReader(directory).read(stored(directory, codec.encode_chunk(whole)), kinds)
    expected = [column for column in whole.columns if column.kind in kinds]
    assert [(column.kind, column.end_token) for column in chunk.columns] == [
        (column.kind, column.end_token) for column in expected
    ]
    for column, other in zip(chunk.columns, expected, strict=True):
        np.testing.assert_array_equal(column.values, other.values)


def test_what_is_no_chunk_is_refused(tmp_path: Path) -> None:
    location = stored(tmp_path, codec.encode_chunk(a_chunk(10)))
    reader = ColumnReader(tmp_path)
    with pytest.raises(NotFoundError, match="retired"):
        reader.read(Location(2, 8, 10), set())
    for wrong in (Location(1, HEADER.size, 6), location._replace(size_bytes=location.size_bytes + 1000)):
        with pytest.raises(CorruptDataError, match="is no chunk"):
            reader.read(wrong, {ColumnKind.TOKEN_IDS})


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
def test_damage_never_does_worse_than_an_error(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    directory = tmp_path_factory.getbasetemp()
    location = stored(directory, codec.encode_chunk(a_chunk(20)))
    path = segment_path(directory, 1)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(location.offset, location.offset + location.size_bytes - 1))
        content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with suppress(CorruptDataError, InvalidDataError):
        ColumnReader(directory).read(location, set(ColumnKind))
