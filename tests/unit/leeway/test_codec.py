"""Between messages and `leeway.types`: what comes back is what was sent, and what makes no sense is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from leeway import codec
from leeway.errors import InvalidDataError
from leeway.types import TrajectoryFailure, WeightManifest, WriteItem, WriteResult, WriteStatus
from leeway.v1 import common_pb2, replay_pb2
from leeway.weights.digests import tensor_entry
from replay_buffer.rules.transitions import ChunkWritten, TrajectoryClosed
from replay_buffer.storage.records import Record, decode, encode
from tests.harness.replay_builders import chunk, close
from tests.unit.leeway.test_trajectory import parts


def test_chunks_survive_the_wire() -> None:
    for original in parts([4, 7]):
        again = codec.decode_chunk(codec.encode_chunk(original))
        assert again.segments == original.segments
        assert again.version_spans == original.version_spans
        for column, other in zip(again.columns, original.columns, strict=True):
            assert (column.kind, column.start_token, column.end_token) == (
                other.kind,
                other.start_token,
                other.end_token,
            )
            assert column.values.dtype == other.values.dtype
            np.testing.assert_array_equal(column.values, other.values)


@pytest.mark.parametrize(
    "tensor",
    [
        common_pb2.Tensor(dtype=common_pb2.DATA_TYPE_INT32, shape=[3], data=b"\0" * 8),
        common_pb2.Tensor(dtype=common_pb2.DATA_TYPE_INT32, shape=[1 << 31, 1 << 31], data=b""),
        common_pb2.Tensor(dtype=common_pb2.DATA_TYPE_UNSPECIFIED, shape=[0], data=b""),
        common_pb2.Tensor(dtype=99, shape=[0], data=b""),  # type: ignore[arg-type]
        common_pb2.Tensor(dtype=common_pb2.DATA_TYPE_BFLOAT16, shape=[1], data=b"\0\0"),
    ],
)
def test_malformed_tensors_are_refused_before_anything_is_allocated(tensor: common_pb2.Tensor) -> None:
    with pytest.raises(InvalidDataError):
        codec.array_from_proto(tensor)


@pytest.mark.parametrize(
    "content", [chunk(), b"", close([chunk()]), TrajectoryFailure("the engine died", retryable=True)]
)
def test_a_write_survives_the_wire(content: object) -> None:
    item = WriteItem("r-g1.0", 2, 2**40, content)  # type: ignore[arg-type]
    message = replay_pb2.WriteItem.FromString(codec.item_to_proto(item).SerializeToString())
    assert codec.item_from_proto(message) == item


def test_a_write_that_makes_no_sense_is_refused() -> None:
    for message, reason in (
        (replay_pb2.WriteItem(trajectory_id="r-g1.0"), "'r-g1.0' carries neither chunk, close nor failure"),
        (codec.item_to_proto(WriteItem("t", 1, 0, replace(close([]), reward=math.nan))), "reward must be finite"),
        (replay_pb2.WriteItem(close=codec.close_to_proto(close([]))), "0 is not a FinishReason"),
    ):
        if reason.endswith("FinishReason"):
            message.close.finish_reason = 0  # type: ignore[assignment]
        with pytest.raises(InvalidDataError, match=reason):
            codec.item_from_proto(message)


def test_the_log_keeps_what_a_writer_sent_byte_for_byte() -> None:
    unknown = b"\xf8\x07\x01"  # field 127, of a later writer
    sent = chunk() + unknown
    sealed = codec.close_to_proto(close([sent])).SerializeToString() + unknown
    for data, written in (
        (sent, replay_pb2.WriteItem(trajectory_id="r-g1.0", attempt=2, chunk=sent)),
        (sealed, replay_pb2.WriteItem(trajectory_id="r-g1.0", attempt=2)),
    ):
        if data is sealed:
            written.close.MergeFromString(sealed)
        item = codec.item_from_proto(written)
        transition = (
            TrajectoryClosed("r-g1.0", 2, item.content)  # type: ignore[arg-type]
            if data is sealed
            else ChunkWritten("r-g1.0", 2, 0, sent, ())
        )
        payload = b"".join(encode(Record("r", 1, transition)))
        assert payload.endswith(data)
        assert decode(payload).transition[3 if data is sent else 2] == item.content  # type: ignore[index]


def test_an_answer_survives_the_wire() -> None:
    for result in (
        WriteResult("r-g1.0", 1, 3, WriteStatus.ACKNOWLEDGED),
        WriteResult("r-g1.0", 1, 3, WriteStatus.EXHAUSTED, 9, "why", 1.5),
    ):
        assert codec.result_from_proto(codec.result_to_proto(result)) == result


def test_a_stream_of_weights_is_cut_at_tensor_boundaries() -> None:
    buffers = [b"abcd", b"", b"efghijkl"]
    manifest = WeightManifest(
        tuple(tensor_entry(name, "uint8", (len(data),), data) for name, data in zip("abc", buffers, strict=True))
    )
    assert list(codec.split_buffers(manifest, [b"abc", b"de", b"fghijkl"])) == buffers
    with pytest.raises(InvalidDataError, match="end inside tensor c"):
        list(codec.split_buffers(manifest, [b"abcd"]))
    with pytest.raises(InvalidDataError, match="more bytes"):
        list(codec.split_buffers(manifest, [b"abcdefghijkl", b"m"]))
