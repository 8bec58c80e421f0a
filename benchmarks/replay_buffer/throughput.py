"""Insert and draw at every size: contenders in turn, so that a drift of the machine meets all of them."""

from __future__ import annotations

import shutil
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final

from benchmarks.replay_buffer import processes
from benchmarks.replay_buffer.contenders import Bare, Contender, Leeway, Peer, PlainFile, Sample, Unanswered
from benchmarks.replay_buffer.processes import Driver, MissingPeer, killed_at_end
from benchmarks.replay_buffer.report import Key, Results
from benchmarks.replay_buffer.workload import Workload
from leeway.service.ports import free_port

HOST: Final = "127.0.0.1"
BARE, UNANSWERED, KEPT = "bare stream", "bare, unanswered", "bare, kept"
FILE, LEEWAY = "plain file", "Leeway"
UNSYNCED, REVERB, REDIS = "Leeway, no fsync", "Reverb 0.14", "Redis"
NAMES: Final = (BARE, UNANSWERED, KEPT, FILE, LEEWAY, UNSYNCED, REVERB, REDIS)
_KINDS: Final = {BARE: Bare, UNANSWERED: Unanswered, KEPT: Bare, LEEWAY: Leeway, UNSYNCED: Leeway}


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
                    present.append(await stack.enter_async_context(started(name, folder / "servers", peers)))
                except MissingPeer as error:
                    results.missing[name] = str(error)
            for per_message in workload.per_message:
                await _repeat(results, present, workload, per_message, repetitions)
        shutil.rmtree(folder / "servers", ignore_errors=True)
        print(f"  measured {workload.name}", flush=True)
    return results


async def _repeat(
    results: Results, contenders: Sequence[Contender], workload: Workload, per_message: int, repetitions: int
) -> None:
    for repetition in range(repetitions + 1):  # the first one warms up
        samples: dict[Key, Sample] = {}
        for contender in contenders:
            if isinstance(contender, (Peer, PlainFile)) and per_message != workload.per_message[0]:
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
async def started(name: str, folder: Path, peers: Path) -> AsyncGenerator[Contender]:
    """A contender with its server on an empty directory.

    Raises:
        MissingPeer: it cannot be had here.
    """
    port = free_port(HOST)
    directory = folder / name.lower().replace(" ", "-").replace(",", "")
    if name in _KINDS:
        if name in (BARE, UNANSWERED):
            server, durability = processes.bare_server(directory, port), "none; counts bytes"
        elif name == KEPT:
            server, durability = processes.kept_server(directory, port), "fdatasync before each answer; decides nothing"
        elif name == LEEWAY:
            server, durability = processes.replay_buffer(directory, port), "fdatasync before each answer"
        else:
            server = processes.replay_buffer(directory, port, module="benchmarks.replay_buffer.unsynced_server")
            durability = "the same log, never synced"
        with killed_at_end(server):
            contender = _KINDS[name](name, durability, server, f"{HOST}:{port}")
            await contender.connect()
            yield contender
            await contender.aclose()
        return
    if name == FILE:
        file = PlainFile(name, "one fdatasync per mebibyte", folder / "plain-file")
        try:
            yield file
        finally:
            file.close()
        return
    python = processes.environment("reverb" if name == REVERB else "redis", peers)
    if name == REVERB:
        server, durability = processes.reverb_server(python, directory, port), "memory, until a checkpoint"
    else:
        server, durability = processes.redis_server(directory, port), "AOF, fsync always"
    with killed_at_end(server):
        await processes.listening(HOST, port)
        script = "reverb_peer.py" if name == REVERB else "redis_peer.py"
        driver = Driver(python, script, port, directory / "driver.log")
        try:
            yield Peer(name, durability, server, driver)
        finally:
            driver.close()
