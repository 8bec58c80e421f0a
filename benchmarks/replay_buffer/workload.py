"""Trajectories of the sizes that are compared, as a rollout worker writes them: they pass every check of a close."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import Final

import numpy as np

from leeway import codec
from leeway.types import (
    Array,
    Column,
    ColumnKind,
    FinishReason,
    ModelSignature,
    PolicyVersion,
    RunSpec,
    SamplingParams,
    Segment,
    SegmentKind,
    TrajectoryChunk,
    TrajectoryClose,
    VersionSpan,
)
from leeway.v1 import replay_pb2

MOE_LAYERS: Final = 48
EXPERTS: Final = 128
EXPERTS_PER_TOKEN: Final = 8
TOP_K: Final = 20
MEMBERS: Final = 8
PROMPT_TOKENS: Final = 16
MAX_CHUNK_BYTES: Final = 1 << 20
DATASET_DIGEST: Final = hashlib.sha256(b"benchmark").digest()
MOMENT: Final = datetime(2026, 1, 1, tzinfo=UTC)
SIGNATURE: Final = ModelSignature(
    model_digest=hashlib.sha256(b"model").digest(),
    tokenizer_digest=hashlib.sha256(b"tokenizer").digest(),
    vocab_size=151_936,
    moe_layers=MOE_LAYERS,
    experts=EXPERTS,
    experts_per_token=EXPERTS_PER_TOKEN,
    context_length=32_768,
)


@dataclass(frozen=True, slots=True)
class Workload:
    """One size of trajectory.

    Args:
        name: what it is called in tables.
        tokens: per trajectory, prompt included; 8 bytes each for id and behavior log-prob.
        topk: whether the top 20 are recorded: 160 bytes a token.
        routing: whether routing is recorded, 48 layers of 8 experts: 384 bytes a token.
        count: trajectories per repetition.
        per_message: trajectories in one message, as contenders of their own.
    """

    name: str
    tokens: int
    topk: bool
    routing: bool
    count: int
    per_message: tuple[int, ...] = (1,)


WORKLOADS: Final = (
    Workload("7 KB", 880, topk=False, routing=False, count=4096, per_message=(1, 32)),
    Workload("69 KB", 410, topk=True, routing=False, count=2048, per_message=(1, 8)),
    Workload("190 KB", 344, topk=True, routing=True, count=1024),
    Workload("9 MB", 16_384, topk=True, routing=True, count=24),
)


def run_spec(run: str, groups_per_step: int, *, members: int = MEMBERS, max_staleness: int = 0) -> RunSpec:
    """A run whose step takes every trajectory of one repetition."""
    return RunSpec(
        run=run,
        groups_per_step=groups_per_step,
        members=members,
        max_staleness=max_staleness,
        total_steps=1_000_000,
        seed=0,
        train_task_count=1000,
        sampling=SamplingParams(max_tokens=32_768),
        signature=SIGNATURE,
        dataset_digest=DATASET_DIGEST,
        root=PolicyVersion(run, 0, 0, hashlib.sha256(b"root").digest()),
        max_attempts=3,
    )


@dataclass(frozen=True, slots=True)
class Prepared:
    """One trajectory's content, serialized: every id gets a copy of it."""

    chunks: tuple[bytes, ...]
    close: TrajectoryClose

    @property
    def size_bytes(self) -> int:
        return sum(map(len, self.chunks))


def prepare(workload: Workload, version: PolicyVersion, *, chunk_tokens: int | None = None) -> Prepared:
    """Random columns, sampled from one version; chunks of at most a mebibyte, or of so many tokens."""
    bytes_per_token = 8 + 8 * TOP_K * workload.topk + MOE_LAYERS * EXPERTS_PER_TOKEN * workload.routing
    per_chunk = chunk_tokens or MAX_CHUNK_BYTES // bytes_per_token
    bounds = [*range(0, workload.tokens, per_chunk), workload.tokens]
    random = np.random.default_rng(0)
    chunks = tuple(codec.encode_chunk(_chunk(workload, random, begin, end, version)) for begin, end in pairwise(bounds))
    return Prepared(chunks, sealed(chunks, workload.tokens))


def sealed(chunks: Sequence[bytes], num_tokens: int) -> TrajectoryClose:
    """The close of a trajectory that consists of these chunks."""
    digest = codec.chain_digest(codec.EMPTY_CHAIN, *chunks)
    return TrajectoryClose(len(chunks), num_tokens, digest, FinishReason.STOP, 1.0, MOMENT, MOMENT)


def _chunk(
    workload: Workload, random: np.random.Generator, begin: int, end: int, version: PolicyVersion
) -> TrajectoryChunk:
    sampled_begin = max(begin, PROMPT_TOKENS)
    sampled = end - sampled_begin

    def ids(*shape: int) -> Array:
        return random.integers(0, SIGNATURE.vocab_size, shape, dtype=np.int32)

    def logprobs(*shape: int) -> Array:
        return -random.random(shape, dtype=np.float32)

    columns = [
        Column(ColumnKind.TOKEN_IDS, begin, end, ids(end - begin)),
        Column(ColumnKind.BEHAVIOR_LOGPROBS, sampled_begin, end, logprobs(sampled)),
    ]
    if workload.topk:
        columns += [
            Column(ColumnKind.TOPK_TOKEN_IDS, sampled_begin, end, ids(sampled, TOP_K)),
            Column(ColumnKind.TOPK_LOGPROBS, sampled_begin, end, logprobs(sampled, TOP_K)),
        ]
    if workload.routing:
        end_row = min(end, workload.tokens - 1)  # the last token was never fed to the model
        shape = (end_row - begin, MOE_LAYERS, EXPERTS_PER_TOKEN)
        columns.append(Column(ColumnKind.ROUTING, begin, end_row, random.integers(0, EXPERTS, shape, dtype=np.uint8)))
    prompt = (Segment(SegmentKind.PROMPT, 0, PROMPT_TOKENS),) if not begin else ()
    model = Segment(SegmentKind.MODEL, PROMPT_TOKENS, end, in_loss=True, sampling=SamplingParams(), engine="none/1")
    return TrajectoryChunk(tuple(columns), (*prompt, model), (VersionSpan(sampled_begin, end, version),))


def messages(
    run: str, trajectory_ids: Sequence[str], prepared: Prepared, per_message: int
) -> list[replay_pb2.WriteTrajectoriesRequest]:
    """Whole trajectories, `per_message` in each message; one of several chunks takes a message per chunk."""
    requests: list[replay_pb2.WriteTrajectoriesRequest] = []
    close = codec.close_to_proto(prepared.close)
    last = len(prepared.chunks) - 1
    for begin in range(0, len(trajectory_ids), per_message):
        together = trajectory_ids[begin : begin + per_message]
        for seq, chunk in enumerate(prepared.chunks):
            request = replay_pb2.WriteTrajectoriesRequest(run=run, server_id="writer")
            for trajectory_id in together:
                request.items.add(trajectory_id=trajectory_id, attempt=1, seq=seq, chunk=chunk)
                if seq == last:
                    request.items.add(trajectory_id=trajectory_id, attempt=1, seq=seq + 1, close=close)
            requests.append(request)
    return requests
