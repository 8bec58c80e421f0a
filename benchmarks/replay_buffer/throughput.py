"""Insert and draw at every size: contenders in turn, so that a drift of the machine meets all of them."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final

from benchmarks.replay_buffer import processes
from benchmarks.replay_buffer.contenders import Bare, Contender, Leeway, Peer, Sample
from benchmarks.replay_buffer.processes import Driver, MissingPeer, killed_at_end
from benchmarks.replay_buffer.report import Key, Results
from benchmarks.replay_buffer.workload import Workload
from leeway.ports import free_port

HOST: Final = "127.0.0.1"
BARE, LEEWAY, UNSYNCED, REVERB, REDIS = "bare stream", "Leeway", "Leeway, no fsync", "Reverb 0.14", "Redis"


async def measure(
    workloads: Sequence[Workload], contenders: Sequence[str], repetitions: int, folder: Path, peers: Path
) -> Results:
    """Every contender at every size; what could not be had is left out and named."""
    results = Results()
    for workload in workloads:
        async with AsyncExitStack() as stack:
            present: list[Contender] = []
            for name in contenders:
                try:
                    present.append(await stack.enter_async_context(_started(name, folder / "servers", peers)))
                except MissingPeer as error:
                    results.missing[name] = str(error)
            for per_message in workload.per_message:
                await _repeat(results, present, workload, per_message, repetitions)
        shutil.rmtree(folder / "servers")
    return results


async def _repeat(
    results: Results, contenders: Sequence[Contender], workload: Workload, per_message: int, repetitions: int
) -> None:
    for repetition in range(repetitions + 1):  # the first one warms up
        samples: dict[Key, Sample] = {}
        for contender in contenders:
            if isinstance(contender, Peer) and per_message != workload.per_message[0]:
                continue
            await contender.prepare(workload, per_message)
            key = Key(workload.name, workload.count, per_message, contender.name)
            samples[key._replace(op="insert")] = await contender.insert()
            samples[key._replace(op="draw")] = await contender.draw()
            if contender.name == LEEWAY:
                assert isinstance(contender, Leeway)
                samples[key._replace(op="assembled")] = await contender.draw_assembled()
            results.durability[contender.name] = contender.durability
        if repetition:
            for key, sample in samples.items():
                results.samples[key].append(sample)


@asynccontextmanager
async def _started(name: str, folder: Path, peers: Path) -> AsyncIterator[Contender]:
    """A contender with its server on an empty directory."""
    port = free_port(HOST)
    address, directory = f"{HOST}:{port}", folder / name.lower().replace(" ", "-").replace(",", "")
    if name in (BARE, LEEWAY, UNSYNCED):
        if name == BARE:
            server, durability = processes.bare_server(directory, port), "none; counts bytes"
        elif name == LEEWAY:
            server, durability = processes.replay_buffer(directory, port), "fdatasync before each answer"
        else:
            server = processes.replay_buffer(directory, port, module="benchmarks.replay_buffer.unsynced_server")
            durability = "the same log, never synced"
        with killed_at_end(server):
            contender = (Bare if name == BARE else Leeway)(name, durability, server, address)
            await contender.connect()
            yield contender
            await contender.aclose()
        return
    script = "reverb_peer.py" if name == REVERB else "redis_peer.py"
    python = processes.environment("reverb" if name == REVERB else "redis", peers)
    if name == REVERB:
        server, durability = processes.reverb_server(python, directory, port), "memory only, until a checkpoint"
    else:
        server, durability = processes.redis_server(directory, port), "AOF, fsync always"
    with killed_at_end(server):
        await wait_for_port(port)
        driver = Driver(python, script, port, directory / "driver.log")
        try:
            yield Peer(name, durability, server, driver)
        finally:
            driver.close()


async def wait_for_port(port: int, timeout_seconds: float = 60.0) -> None:
    """Until somebody listens there."""
    import asyncio

    async with asyncio.timeout(timeout_seconds):
        while True:
            try:
                _, writer = await asyncio.open_connection(HOST, port)
            except OSError:
                await asyncio.sleep(0.02)
            else:
                writer.close()
                return


_defaultdict = defaultdict
