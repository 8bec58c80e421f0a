"""A learner in a process of its own that trains, publishes and keeps checkpoints: what a kill -9 ends.

    told      publish                    train a step, say its version, announce it
              die, where                 SIGKILL itself the next time it is there
              end faults                 from now on nothing goes wrong
    says      version                    before anyone can know it: what the replay buffer registers at Advance
              counts, refusals           after each publication and acknowledgement, all of this incarnation

It starts from the newest checkpoint, which is at times steps behind what was published: those versions are abandoned,
and the steps that follow are versions of its own epoch.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from leeway.weights.broadcast import BroadcastGroup
from tests.harness.processes import hear, tell
from tests.push.faults import Faults, FaultyPublisher
from tests.push.history import PIECE_BYTES, History

_CHECKPOINT_STEPS = 4


async def _learn(
    pipe: Any, address: str, directory: Path, seed: int, epoch: int, start: int, probability: float
) -> None:
    commands: asyncio.Queue[Mapping[str, Any]] = asyncio.Queue()
    hear(pipe, commands.put_nowait)
    faults = Faults(f"{seed} {start}", probability)
    history = History(seed, epoch, start)
    history.restore(directory)
    publisher = FaultyPublisher(faults)

    def say_counts() -> None:
        tell(pipe, counts=faults.counts + _sent(publisher), refusals=_refusals(publisher))

    publisher.on_acknowledged = say_counts

    async def publish() -> None:
        snapshot = history.snapshot()
        version = snapshot.version
        tell(pipe, version=[version.epoch, version.step, version.digest.hex()], epoch=epoch)
        await publisher.publish(snapshot)
        say_counts()

    server = await publisher.start(address)  # served as long as it is held
    await publish()
    while (command := await commands.get())["do"] != "end":
        match command["do"]:
            case "publish":
                history.train()
                await publish()
                if history.step % _CHECKPOINT_STEPS == 0:
                    history.save(directory)
            case "die":
                faults.dies_at = command["where"]
            case "end faults":
                faults.probability = 0.0
            case unknown:
                raise ValueError(unknown)
    await server.stop(0.0)


def _sent(publisher: FaultyPublisher) -> Counter[str]:
    sent = Counter({"acknowledgements": publisher.acknowledged})
    for family in publisher.metrics.published_bytes.collect():
        for sample in family.samples:
            if sample.name.endswith("_total"):
                sent[f"KiB as {sample.labels['kind']} over {sample.labels['transport']}"] = round(sample.value / 1024)
    return sent


def _refusals(publisher: FaultyPublisher) -> list[str]:
    return [f"{name}: {server.refusal}" for name, server in publisher._servers.items() if server.refusal]


def learn(pipe: Any, address: str, directory: str, seed: int, epoch: int, start: int, probability: float) -> None:
    """Be one incarnation of the learner."""
    BroadcastGroup.piece_bytes = PIECE_BYTES
    logging.disable(logging.CRITICAL)
    asyncio.run(_learn(pipe, address, Path(directory), seed, epoch, start, probability))
