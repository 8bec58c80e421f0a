"""How it goes with more writers, and with a log that grows."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

from benchmarks.replay_buffer import processes
from benchmarks.replay_buffer.contenders import Leeway, write_all
from benchmarks.replay_buffer.processes import killed_at_end
from benchmarks.replay_buffer.recovery import restarted
from benchmarks.replay_buffer.workload import WORKLOADS, Workload, messages, prepare
from leeway.service.ports import free_port

HOST: Final = "127.0.0.1"
WRITERS: Final = (1, 4, 16, 64, 256)
_SMALL: Final = WORKLOADS[0]
_STEP: Final = Workload("190 KB", 344, topk=True, routing=True, count=512)


async def writers(folder: Path, repetitions: int) -> None:
    """Trajectories of 7 KB from more and more streams at once; prints as it goes."""
    port = free_port(HOST)
    server = processes.replay_buffer(folder / "writers", port)
    print("\nwriters: 7 KB, one trajectory a message, a stream each\n  streams  per second  server us")
    with killed_at_end(server):
        contender = Leeway("Leeway", "", server, f"{HOST}:{port}")
        await contender.connect()
        client = await contender.open(_SMALL.count // 8)
        for streams in WRITERS:
            best = (0.0, 0.0)
            for _ in range(repetitions):
                ids = await contender.trajectory_ids(_SMALL.count)
                prepared = prepare(_SMALL, contender.head)
                written = [messages(client.run, ids[stream::streams], prepared, 1) for stream in range(streams)]
                sample = await contender.time(partial(write_all, client, written))
                best = max(best, (_SMALL.count / sample.seconds, 1e6 * sample.server_cpu_seconds / _SMALL.count))
                await client.draw_batch(contender.epoch, contender.head.step + 1, 60.0)
                await contender.advance()
            print(f"  {streams:>7}  {best[0]:>10.0f}  {best[1]:>9.0f}", flush=True)
        await contender.aclose()
    shutil.rmtree(folder / "writers", ignore_errors=True)


async def log(folder: Path, gigabytes: Sequence[float]) -> None:
    """Restart, memory, insert and draw at several sizes of the log; prints as it goes."""
    port = free_port(HOST)
    server = processes.replay_buffer(folder / "log", port)
    print("\nlog: 190 KB trajectories, committed step by step\n      GB  restart s  memory MB  insert/s   draw/s")
    with killed_at_end(server):
        contender = Leeway("Leeway", "", server, f"{HOST}:{port}")
        await contender.connect()
        written = 0
        for size in gigabytes:
            while True:
                await contender.prepare(_STEP, 1)
                inserted = await contender.insert()
                drawn = await contender.draw()
                written += _STEP.count * 190_000
                if written >= size * 1e9:
                    break
            await contender.advance()
            seconds = await restarted(contender)
            memory = contender.server.memory_bytes() / 1e6
            contender.mark_advanced()
            print(
                f"  {written / 1e9:>6.1f}  {seconds:>9.2f}  {memory:>9.0f}  {_STEP.count / inserted.seconds:>8.0f} "
                f"{_STEP.count / drawn.seconds:>8.0f}",
                flush=True,
            )
        await contender.aclose()
    shutil.rmtree(folder / "log", ignore_errors=True)
