from datetime import UTC, datetime

import numpy as np
import pytest

from leeway import codec
from leeway.errors import CorruptDataError, InvalidDataError
from leeway.trajectory.assembly import assemble_trajectory
from leeway.types import (
    Column,
    ColumnKind,
    FinishReason,
    PolicyVersion,
    SamplingParams,
    Segment,
    SegmentKind,
    TrajectoryChunk,
    TrajectoryClose,
    TrajectoryRecord,
    VersionSpan,
)
from leeway.v1 import common_pb2

VERSION = PolicyVersion("demo", 1, 3, bytes(range(32)))
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
PROMPT, SAMPLED, LAYERS, TOP = 3, 4, 2, 2


def chunks() -> list[TrajectoryChunk]:
    """Tokens first; routing late, in one piece, as real engines send it."""
    n = PROMPT + SAMPLED
    return [
        TrajectoryChunk(
            columns=(
                Column(ColumnKind.TOKEN_IDS, 0, PROMPT, np.arange(PROMPT, dtype=np.int32)),
                Column(ColumnKind.TOKEN_IDS, PROMPT, PROMPT + 1, np.array([9], np.int32)),
                Column(ColumnKind.BEHAVIOR_LOGPROBS, PROMPT, PROMPT + 1, np.array([-0.5], np.float32)),
            ),
            segments=(
                Segment(SegmentKind.PROMPT, 0, PROMPT),
                Segment(SegmentKind.MODEL, PROMPT, PROMPT + 1, in_loss=True, sampling=SamplingParams(), engine="e/1"),
            ),
            version_spans=(VersionSpan(PROMPT, PROMPT + 1, VERSION),),
        ),
        TrajectoryChunk(
            columns=(
                Column(ColumnKind.TOKEN_IDS, PROMPT + 1, n, np.array([8, 7, 6], np.int32)),
                Column(ColumnKind.BEHAVIOR_LOGPROBS, PROMPT + 1, n, np.array([-1, -2, 0], np.float32)),
                Column(
                    ColumnKind.ROUTING,
                    0,
                    n - 1,
                    np.arange((n - 1) * LAYERS * TOP, dtype=np.uint8).reshape(n - 1, LAYERS, TOP),
                ),
            ),
            segments=(Segment(SegmentKind.MODEL, PROMPT, n, in_loss=True, sampling=SamplingParams(), engine="e/1"),),
            version_spans=(VersionSpan(PROMPT + 1, n, VERSION),),
        ),
    ]


def record(parts: list[TrajectoryChunk], **changes: object) -> TrajectoryRecord:
    data = tuple(codec.encode_chunk(part) for part in parts)
    digest = codec.EMPTY_CHAIN
    for chunk in data:
        digest = codec.chain_digest(digest, chunk)
    close = {
        "chunk_count": len(data),
        "token_count": PROMPT + SAMPLED,
        "digest": digest,
        "finish_reason": FinishReason.STOP,
        "reward": 1.0,
        "generation_started_at": NOW,
        "generation_finished_at": NOW,
        **changes,
    }
    return TrajectoryRecord("t", 0, 1, "server-0", TrajectoryClose(**close), "", data)  # type: ignore[arg-type]


def test_chunks_survive_the_wire() -> None:
    for chunk in chunks():
        again = codec.decode_chunk(codec.encode_chunk(chunk))
        assert again.segments == chunk.segments
        assert again.version_spans == chunk.version_spans
        for column, original in zip(again.columns, chunk.columns, strict=True):
            assert (column.kind, column.start_token, column.end_token) == (
                original.kind,
                original.start_token,
                original.end_token,
            )
            assert column.values.dtype == original.values.dtype
            np.testing.assert_array_equal(column.values, original.values)


def test_a_trajectory_is_assembled_on_one_axis() -> None:
    trajectory = assemble_trajectory(record(chunks()))
    np.testing.assert_array_equal(trajectory.token_ids, [0, 1, 2, 9, 8, 7, 6])
    np.testing.assert_array_equal(trajectory.loss_mask, [False] * PROMPT + [True] * SAMPLED)
    np.testing.assert_array_equal(trajectory.behavior_logprobs, np.array([0, 0, 0, -0.5, -1, -2, 0], np.float32))
    assert trajectory.routing is not None
    assert trajectory.routing.shape == (PROMPT + SAMPLED - 1, LAYERS, TOP)


def test_changed_bytes_are_noticed() -> None:
    good = record(chunks())
    flipped = bytearray(good.chunks[1])
    flipped[-1] ^= 1
    bad = TrajectoryRecord("t", 0, 1, "s", good.close, "", (good.chunks[0], bytes(flipped)))
    with pytest.raises(CorruptDataError, match="trajectory t"):
        assemble_trajectory(bad)
    with pytest.raises(CorruptDataError):
        assemble_trajectory(TrajectoryRecord("t", 0, 1, "s", good.close, "", good.chunks[:1]))


def _without(kind: ColumnKind) -> list[TrajectoryChunk]:
    return [
        TrajectoryChunk(
            tuple(column for column in chunk.columns if column.kind is not kind), chunk.segments, chunk.version_spans
        )
        for chunk in chunks()
    ]


def _replaced(kind: ColumnKind, values: np.ndarray) -> list[TrajectoryChunk]:
    first, last = chunks()
    columns = tuple(
        Column(kind, column.start_token, column.end_token, values) if column.kind is kind else column
        for column in last.columns
    )
    return [first, TrajectoryChunk(columns, last.segments, last.version_spans)]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (_without(ColumnKind.BEHAVIOR_LOGPROBS), "behavior log-probs must cover"),
        (_without(ColumnKind.TOKEN_IDS), "token ids are missing"),
        (_replaced(ColumnKind.BEHAVIOR_LOGPROBS, np.array([-1, np.nan, 0], np.float32)), "not a finite number"),
        (_replaced(ColumnKind.BEHAVIOR_LOGPROBS, np.array([-1, -np.inf, 0], np.float32)), "not a finite number"),
        (_replaced(ColumnKind.BEHAVIOR_LOGPROBS, np.array([-1, 0.5, 0], np.float32)), "at most 0"),
        (_replaced(ColumnKind.BEHAVIOR_LOGPROBS, np.array([-1, -1, 0], np.float64)), "changes its type"),
        (chunks()[:1], "segments cover 4 tokens of 7"),
        ([*chunks(), chunks()[1]], "overlaps"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(parts: list[TrajectoryChunk], message: str) -> None:
    with pytest.raises(InvalidDataError, match=f"trajectory t: .*{message}"):
        assemble_trajectory(record(parts))


def test_missing_version_spans_are_refused() -> None:
    parts = [TrajectoryChunk(chunk.columns, chunk.segments) for chunk in chunks()]
    with pytest.raises(InvalidDataError, match="version spans must cover"):
        assemble_trajectory(record(parts))


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


def test_a_stream_of_weights_is_cut_at_tensor_boundaries() -> None:
    from leeway.types import WeightManifest
    from leeway.weights.digests import tensor_entry

    buffers = [b"abcd", b"", b"efghijkl"]
    manifest = WeightManifest(
        tuple(tensor_entry(name, "uint8", (len(data),), data) for name, data in zip("abc", buffers, strict=True))
    )
    assert list(codec.split_buffers(manifest, [b"abc", b"de", b"fghijkl"])) == buffers
    with pytest.raises(InvalidDataError, match="end inside tensor c"):
        list(codec.split_buffers(manifest, [b"abcd"]))
    with pytest.raises(InvalidDataError, match="more bytes"):
        list(codec.split_buffers(manifest, [b"abcdefghijkl", b"m"]))
