"""Token chunks: many concurrent streams of 32 tokens a message, the service confined to one core."""

from __future__ import annotations

import os
import shutil
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

from benchmarks.replay_buffer import processes
from benchmarks.replay_buffer.contenders import Leeway, Sample, write_all
from benchmarks.replay_buffer.processes import killed_at_end
from benchmarks.replay_buffer.workload import MEMBERS, Workload, messages, prepare
from leeway.service.ports import free_port

STREAMS: Final = 16
CHUNK_TOKENS: Final = 32
_WORKLOAD: Final = Workload("tokens", 512, topk=False, routing=False, count=STREAMS * 2 * MEMBERS)
NUM_TOKENS: Final = _WORKLOAD.tokens * _WORKLOAD.count


async def measure(repetitions: int, folder: Path) -> list[Sample]:
    """Write trajectories of 512 tokens in chunks of 32, one chunk a message; each repetition is a step of its own."""
    port = free_port("127.0.0.1")
    samples: list[Sample] = []
    with apart_from_server() as cpus:
        server = processes.replay_buffer(folder / "tokens", port, cpus=cpus)
        with killed_at_end(server):
            contender = Leeway("Leeway", "", server, f"127.0.0.1:{port}")
            await contender.connect()
            client = await contender.open(_WORKLOAD.count // MEMBERS)
            for repetition in range(repetitions + 1):
                ids = await contender.trajectory_ids(_WORKLOAD.count)
                prepared = prepare(_WORKLOAD, contender.head, chunk_tokens=CHUNK_TOKENS)
                streams = [messages(client.run, ids[stream::STREAMS], prepared, 1) for stream in range(STREAMS)]
                sample = await contender.time(partial(write_all, client, streams))
                if repetition:
                    samples.append(sample)
                await client.draw_batch(contender.epoch, contender.head.step + 1, 60.0)
                await contender.advance()
            await contender.aclose()
    shutil.rmtree(folder / "tokens", ignore_errors=True)
    return samples


@contextmanager
def apart_from_server() -> Iterator[list[int]]:
    """One core for the server, which is yielded; this process keeps off it while there are others."""
    allowed = os.sched_getaffinity(0)
    first = min(allowed)
    os.sched_setaffinity(0, allowed - {first} or allowed)
    try:
        yield [first]
    finally:
        os.sched_setaffinity(0, allowed)


def tokens_per_second(samples: list[Sample]) -> float:
    """Median over repetitions."""
    return statistics.median(NUM_TOKENS / sample.seconds for sample in samples)


def print_tokens(samples: list[Sample]) -> None:
    """The rate, and what it costs."""
    rates = sorted(NUM_TOKENS / sample.seconds for sample in samples)
    server = statistics.median(1e6 * sample.server_cpu_seconds / NUM_TOKENS for sample in samples)
    print(
        f"\n{STREAMS} streams, {CHUNK_TOKENS} tokens a message, service on one core: "
        f"{tokens_per_second(samples):.0f} tokens/s durable ({rates[0]:.0f} to {rates[-1]:.0f}), "
        f"{server:.1f} us of its CPU per token"
    )
