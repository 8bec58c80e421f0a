"""A write read off the wire is what protobuf makes of it; an answer written by hand is what protobuf writes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leeway import codec
from leeway.codec.fields import read_write
from leeway.errors import InvalidDataError
from leeway.types import WriteItem, WriteResult, WriteStatus
from leeway.v1 import log_pb2, replay_pb2, trajectory_pb2
from replay_buffer.rules.transitions import ChunkWritten, TrajectoryClosed
from replay_buffer.storage.records import Record, decode, encode
from tests.harness.replay_builders import chunk, close

NUMBERS = st.sampled_from([0, 1, 127, 128, 300, 2**21, 2**32 - 1])
LONG_NUMBERS = st.one_of(NUMBERS, st.sampled_from([2**35, 2**63, 2**64 - 1]))
NAMES = st.sampled_from(["", "a-run-g1.0", "Gruppe-ü.3", "x" * 200])


@st.composite
def items(draw: st.DrawFn) -> replay_pb2.WriteItem:
    item = replay_pb2.WriteItem(trajectory_id=draw(NAMES), attempt=draw(NUMBERS), seq=draw(LONG_NUMBERS))
    match draw(st.sampled_from(["chunk", "close", "failure", ""])):
        case "chunk":
            item.chunk = draw(st.binary(max_size=300))
        case "close":
            item.close.CopyFrom(codec.close_to_proto(close([chunk()])))
        case "failure":
            item.failure.message, item.failure.retryable = draw(NAMES), draw(st.booleans())
        case _:
            pass
    return item


@st.composite
def requests(draw: st.DrawFn) -> replay_pb2.WriteTrajectoriesRequest:
    return replay_pb2.WriteTrajectoriesRequest(
        run=draw(NAMES), server_id=draw(NAMES), items=draw(st.lists(items(), max_size=4))
    )


def read(message: bytes) -> tuple[str, str, list[tuple[object, ...]]]:
    """What a message says, as it is taken from the wire."""
    run, server_id, found = codec.write_from_wire(message)
    return run, server_id, [_item(codec.item_from_wire(item)) if item.tag else item[:3] for item in found]


def expected(request: replay_pb2.WriteTrajectoriesRequest) -> tuple[str, str, list[tuple[object, ...]]]:
    """What protobuf says that it says."""
    found: list[tuple[object, ...]] = []
    for item in request.items:
        head = item.trajectory_id, item.attempt, item.seq
        match item.WhichOneof("content"):
            case "chunk":
                found.append((*head, item.chunk))
            case "close":
                found.append((*head, codec.close_from_proto(item.close)))
            case "failure":
                found.append((*head, codec.failure_from_proto(item.failure)))
            case None:
                found.append(head)
    return request.run, request.server_id, found


def _item(item: WriteItem) -> tuple[object, ...]:
    content = bytes(item.content) if isinstance(item.content, memoryview) else item.content
    return item.trajectory_id, item.attempt, item.seq, content


@given(requests())
def test_a_write_is_what_protobuf_makes_of_it(request: replay_pb2.WriteTrajectoriesRequest) -> None:
    assert read(request.SerializeToString()) == expected(request)


@given(requests(), st.integers(min_value=0), st.integers(min_value=0, max_value=255), st.booleans())
def test_damaged_bytes_are_a_write_only_where_protobuf_says_so(
    request: replay_pb2.WriteTrajectoriesRequest, at: int, byte: int, cut: bool
) -> None:
    message = bytearray(request.SerializeToString())
    if not message:
        return
    at %= len(message)
    message[at:] = message[at + 1 :] if cut else bytes([byte]) + message[at + 1 :]
    try:
        told = expected(codec.parse(replay_pb2.WriteTrajectoriesRequest, bytes(message)))
    except InvalidDataError:
        with pytest.raises(InvalidDataError):
            read(bytes(message))
    else:
        assert read(bytes(message)) == told


def test_fields_in_another_order_are_left_to_protobuf() -> None:
    item = replay_pb2.WriteItem(chunk=chunk()).SerializeToString() + replay_pb2.WriteItem(seq=3).SerializeToString()
    message = (
        b"\x1a" + codec.varint(len(item)) + item + replay_pb2.WriteTrajectoriesRequest(run="r").SerializeToString()
    )
    assert read_write(message) is None
    assert read(message) == ("r", "", [("", 0, 3, chunk())])
    (found,) = codec.write_from_wire(message).items
    assert found.encoded == replay_pb2.WriteItem(seq=3, chunk=chunk()).SerializeToString(), "the log keeps the order"


def test_the_log_keeps_the_item_as_it_came() -> None:
    sent = replay_pb2.WriteItem(trajectory_id="r-g1.0", attempt=2, seq=7, chunk=chunk())
    message = replay_pb2.WriteTrajectoriesRequest(run="r", items=[sent]).SerializeToString()
    item = codec.item_from_wire(codec.write_from_wire(message).items[0])
    assert isinstance(item.content, memoryview)
    written = ChunkWritten(item.trajectory_id, item.attempt, item.seq, item.content, (), item.encoded)
    payload = encode(Record("r", 1, written))
    assert payload[1] is item.encoded
    kept = log_pb2.LogRecord.FromString(b"".join(payload))
    assert kept.chunk_written.SerializeToString() == sent.SerializeToString()


def test_a_close_is_recorded_as_it_came() -> None:
    sealed = codec.close_to_proto(close([chunk()]))
    unknown = sealed.SerializeToString() + b"\xf8\x07\x01"  # field 127, of a later writer
    kept = codec.close_from_proto(trajectory_pb2.TrajectoryClose.FromString(unknown), unknown)
    record = decode(b"".join(encode(Record("r", 1, TrajectoryClosed("r-g1.0", 2, kept)))))
    assert record.transition == TrajectoryClosed("r-g1.0", 2, close([chunk()]))
    assert unknown in b"".join(encode(Record("r", 1, TrajectoryClosed("r-g1.0", 2, kept))))


@given(
    st.lists(
        st.builds(
            WriteResult,
            NAMES,
            NUMBERS,
            LONG_NUMBERS,
            st.sampled_from(WriteStatus),
            st.sampled_from([0, 0, 9]),
            st.sampled_from(["", "", "why"]),
            st.sampled_from([0.0, 0.0, 1.5]),
        ),
        max_size=4,
    )
)
def test_an_answer_is_what_protobuf_writes(results: list[WriteResult]) -> None:
    answer = replay_pb2.WriteTrajectoriesResponse(results=map(codec.result_to_proto, results))
    assert codec.answer_to_wire(results) == answer.SerializeToString()
