"""Small runs, trajectories and writes for tests of the replay buffer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np

from leeway import codec
from leeway.types import (
    Column,
    ColumnKind,
    FinishReason,
    ModelSignature,
    PolicyVersion,
    RunSpec,
    SamplingParams,
    Segment,
    SegmentKind,
    Ticket,
    TicketMember,
    TrajectoryChunk,
    TrajectoryClose,
    VersionSpan,
    WriteItem,
)

RUN = "test-run"
MOMENT = datetime(2026, 11, 22, tzinfo=UTC)
SIGNATURE = ModelSignature(
    model_digest=hashlib.sha256(b"model").digest(),
    tokenizer_digest=hashlib.sha256(b"tokenizer").digest(),
    vocab_size=64,
    moe_layers=0,
    experts=0,
    experts_per_token=0,
    context_length=4096,
)
DATASET = hashlib.sha256(b"tasks").digest()


def version(step: int, epoch: int = 1, run: str = RUN) -> PolicyVersion:
    """A version with a digest of its own; step 0 of epoch 0 is the root."""
    return PolicyVersion(run, epoch, step, hashlib.sha256(f"{epoch}.{step}".encode()).digest())


ROOT = version(0, epoch=0)


def spec(
    run: str = RUN,
    *,
    groups_per_step: int = 2,
    members: int = 2,
    max_staleness: int = 2,
    total_steps: int = 100,
    max_attempts: int = 3,
    train_task_count: int = 10,
) -> RunSpec:
    return RunSpec(
        run=run,
        groups_per_step=groups_per_step,
        members=members,
        max_staleness=max_staleness,
        total_steps=total_steps,
        seed=7,
        train_task_count=train_task_count,
        sampling=SamplingParams(temperature=1.0, max_tokens=16),
        signature=SIGNATURE,
        dataset_digest=DATASET,
        root=version(0, epoch=0, run=run),
        max_attempts=max_attempts,
    )


def chunk(
    versions: Sequence[PolicyVersion] = (ROOT,),
    *,
    prompt: int = 3,
    sampled: int = 4,
    token_id: int = 5,
    logprob: float = -1.0,
) -> bytes:
    """A whole trajectory in one chunk; its sampled tokens are split evenly among the versions."""
    n = prompt + sampled
    bounds = np.linspace(prompt, n, len(versions) + 1).astype(int).tolist()
    return codec.encode_chunk(
        TrajectoryChunk(
            columns=(
                Column(ColumnKind.TOKEN_IDS, 0, n, np.full(n, token_id, np.int32)),
                Column(ColumnKind.BEHAVIOR_LOGPROBS, prompt, n, np.full(sampled, logprob, np.float32)),
            ),
            segments=(
                Segment(SegmentKind.PROMPT, 0, prompt),
                Segment(SegmentKind.MODEL, prompt, n, True, SamplingParams(max_tokens=16), "fake/1"),
            ),
            version_spans=tuple(
                VersionSpan(start, end, version)
                for version, start, end in zip(versions, bounds, bounds[1:], strict=False)
            ),
        )
    )


def close(chunks: Sequence[bytes], *, reward: float = 1.0, token_count: int = 7) -> TrajectoryClose:
    digest = codec.EMPTY_CHAIN
    for data in chunks:
        digest = codec.chain_digest(digest, data)
    return TrajectoryClose(len(chunks), token_count, digest, FinishReason.STOP, reward, MOMENT, MOMENT)


def whole(member: TicketMember, attempt: int, data: bytes | None = None, *, reward: float = 1.0) -> list[WriteItem]:
    """A trajectory from its first chunk to its close."""
    data = chunk() if data is None else data
    return [
        WriteItem(member.trajectory_id, attempt, 0, data),
        WriteItem(member.trajectory_id, attempt, 1, close([data], reward=reward)),
    ]


def filled(ticket: Ticket, versions: Sequence[PolicyVersion] = (ROOT,)) -> list[WriteItem]:
    """Every trajectory of a ticket, complete."""
    return [item for member in ticket.members for item in whole(member, ticket.attempt, chunk(versions))]
