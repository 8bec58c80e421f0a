"""Back after kill -9: Leeway folds its log, Reverb loads its checkpoint. Both times include the process's start."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.replay_buffer import processes
from benchmarks.replay_buffer.contenders import Leeway
from benchmarks.replay_buffer.processes import Driver, MissingPeer, killed_at_end
from benchmarks.replay_buffer.workload import Workload, prepare, run_spec
from leeway.service.ports import free_port

HOST = "127.0.0.1"
WORKLOAD = Workload("190 KB", 344, topk=True, routing=True, count=1536)


@dataclass(frozen=True, slots=True)
class Recovery:
    """What one contender lost and how long it took to come back."""

    name: str
    seconds: float
    checkpoint_seconds: float  # what it costs to be able to come back; 0 where nothing is needed
    lost: int  # of the acknowledged trajectories


async def measure(folder: Path, peers: Path) -> tuple[list[Recovery], str]:
    """Insert 290 MB, kill, start again; also why a contender is missing."""
    found = [await _leeway(folder / "recovery-leeway")]
    missing = ""
    try:
        found.append(await _reverb(folder / "recovery-reverb", processes.environment("reverb", peers)))
    except MissingPeer as error:
        missing = str(error)
    return found, missing


async def _leeway(directory: Path) -> Recovery:
    port = free_port(HOST)
    server = processes.replay_buffer(directory, port)
    with killed_at_end(server):
        contender = Leeway("Leeway", "", server, f"{HOST}:{port}")
        await contender.connect()
        await contender.prepare(WORKLOAD, 1)
        await contender.insert()
        seconds = await restarted(contender)
        status = await contender.client.run_status()
        await contender.aclose()
    shutil.rmtree(directory, ignore_errors=True)
    groups = WORKLOAD.count // status.spec.members
    return Recovery("Leeway", seconds, 0.0, (groups - status.ready) * status.spec.members)


async def restarted(contender: Leeway) -> float:
    """Seconds from the start of a killed service to its answer about the run."""
    contender.server.kill()
    began = time.perf_counter()
    contender.server.start()
    await contender.client.run_status()
    return time.perf_counter() - began


async def _reverb(directory: Path, python: Path) -> Recovery:
    port = free_port(HOST)
    server = processes.reverb_server(python, directory, port)
    size_bytes = prepare(WORKLOAD, run_spec("peer", 1).root).size_bytes
    with killed_at_end(server):
        await processes.listening(HOST, port)
        driver = Driver(python, "reverb_peer.py", port, directory / "driver.log")
        driver.order("insert", size_bytes=size_bytes, count=WORKLOAD.count)
        checkpoint = driver.order("checkpoint")["seconds"]
        driver.close()
        os.sync()
        server.kill()
        began = time.perf_counter()
        server.start()
        await processes.listening(HOST, port)
        seconds = time.perf_counter() - began
        driver = Driver(python, "reverb_peer.py", port, directory / "driver.log")
        held = driver.order("held")["held"]
        driver.close()
    shutil.rmtree(directory, ignore_errors=True)
    return Recovery("Reverb 0.14", seconds, checkpoint, WORKLOAD.count - int(held))


def print_recovery(found: list[Recovery], missing: str) -> None:
    """One line each."""
    print(f"\nback after kill -9 with {WORKLOAD.count} trajectories of 190 KB (290 MB), start of the process included")
    for one in found:
        price = (
            f"its checkpoint took {one.checkpoint_seconds:.1f} s, and what follows it is lost"
            if one.checkpoint_seconds
            else "needs no checkpoint"
        )
        print(f"  {one.name:12} {one.seconds:6.2f} s; lost {one.lost} of what was acknowledged until then; {price}")
    if missing:
        print(f"  Reverb left out: {missing}")
