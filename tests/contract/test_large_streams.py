"""Trajectories of megabytes flow through in pieces: the service never holds a group."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from leeway import codec
from leeway.types import (
    Column,
    ColumnKind,
    FinishReason,
    SamplingParams,
    Segment,
    SegmentKind,
    Ticket,
    TrajectoryChunk,
    TrajectoryClose,
    VersionSpan,
    WriteItem,
    WriteStatus,
)
from leeway.v1 import replay_pb2
from tests.deadlines import WAIT_SECONDS
from tests.harness.buffer_server import connected, serving
from tests.harness.replay_builders import MOMENT, ROOT, RUN, SIGNATURE, spec

MIB = 1 << 20
CHUNKS, CHUNK_TOKENS, TOPK = 32, 128, 256
MEMBERS = 4
TRAJECTORY_BYTES = CHUNKS * CHUNK_TOKENS * TOPK * 8
BUFFERED = 6 * MIB
"""What the service, the network and this test may hold at once."""


def chunks() -> Iterator[bytes]:
    """A trajectory of 8 MiB, chunk by chunk, nearly all of it top-K columns."""
    for number in range(CHUNKS):
        start, end = number * CHUNK_TOKENS, (number + 1) * CHUNK_TOKENS
        shape = (CHUNK_TOKENS, TOPK)
        yield codec.encode_chunk(
            TrajectoryChunk(
                columns=(
                    Column(ColumnKind.TOKEN_IDS, start, end, np.full(CHUNK_TOKENS, 5, np.int32)),
                    Column(ColumnKind.BEHAVIOR_LOGPROBS, start, end, np.full(CHUNK_TOKENS, -1, np.float32)),
                    Column(ColumnKind.TOPK_TOKEN_IDS, start, end, np.full(shape, number, np.int32)),
                    Column(ColumnKind.TOPK_LOGPROBS, start, end, np.full(shape, -1, np.float32)),
                ),
                segments=(Segment(SegmentKind.MODEL, 0, end, True, SamplingParams(max_tokens=16), "fake/1"),),
                version_spans=(VersionSpan(start, end, ROOT),),
            )
        )


def items(ticket: Ticket) -> Iterator[WriteItem]:
    for member in ticket.members:
        digest = codec.EMPTY_CHAIN
        for seq, data in enumerate(chunks()):
            digest = codec.chain_digest(digest, data)
            yield WriteItem(member.trajectory_id, ticket.attempt, seq, data)
        close = TrajectoryClose(CHUNKS, CHUNKS * CHUNK_TOKENS, digest, FinishReason.STOP, 1.0, MOMENT, MOMENT)
        yield WriteItem(member.trajectory_id, ticket.attempt, CHUNKS, close)


async def test_a_group_of_many_megabytes_is_written_and_drawn_in_pieces(tmp_path: Path) -> None:
    signature = replace(SIGNATURE, context_length=CHUNKS * CHUNK_TOKENS)
    sampling = SamplingParams(max_tokens=CHUNKS * CHUNK_TOKENS, topk=TOPK)
    run_spec = replace(
        spec(groups_per_step=1, members=MEMBERS, max_staleness=1), signature=signature, sampling=sampling
    )
    async with (
        serving(tmp_path, slow_pending_bytes=MIB, max_pending_bytes=64 * MIB) as address,
        connected(address) as client,
        asyncio.timeout(WAIT_SECONDS),
    ):
        await client.open_run(run_spec, ROOT, [])
        (ticket, *_), *_ = await client.acquire_tickets("s0", ROOT, MEMBERS, WAIT_SECONDS)
        window = asyncio.Semaphore(4)

        async def requests() -> AsyncIterator[replay_pb2.WriteTrajectoriesRequest]:
            for item in items(ticket):
                await window.acquire()
                yield replay_pb2.WriteTrajectoriesRequest(run=RUN, server_id="s0", items=[codec.item_to_proto(item)])

        gc.collect()
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            count = 0
            async for reply in client.stub.WriteTrajectories(requests()):
                for result in reply.results:
                    assert codec.result_from_proto(result).status is WriteStatus.ACKNOWLEDGED
                    window.release()
                    count += 1
            assert count == MEMBERS * (CHUNKS + 1)
            _, peak = tracemalloc.get_traced_memory()
            assert peak - before < BUFFERED < MEMBERS * TRAJECTORY_BYTES / 4, f"{(peak - before) / MIB:.1f} MiB written"
            tracemalloc.reset_peak()
            drawn = 0
            request = replay_pb2.DrawBatchRequest(run=RUN, epoch=1, step=1)
            async for reply in client.stub.DrawBatch(request, timeout=WAIT_SECONDS):
                assert reply.ByteSize() < 2 * MIB
                drawn += sum(len(piece.chunk) for piece in reply.pieces)
            assert drawn > MEMBERS * TRAJECTORY_BYTES
            _, peak = tracemalloc.get_traced_memory()
            assert peak - before < BUFFERED, f"{(peak - before) / MIB:.1f} MiB drawn"
        finally:
            tracemalloc.stop()
