"""Pushes under kills, corruption, loss and disorder: no engine ever serves a mixture, and every label is right.

    learner: a process, killed with SIGKILL while it announces, in mid transfer, before it hears an acknowledgement or
       │     at any moment; the next one starts from the newest checkpoint, in an epoch of its own
       │ faulty gRPC, ZeroMQ and broadcasts
       ▼
    receivers: processes, killed with SIGKILL and restarted ── UpdateWeights ──> engines, which outlive them
                                                                                    └── looked at all the time

`python -m tests.push --pushes 1000`. At the end the faults stop and every engine must reach the last version.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import tempfile
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path

from inference_server.served_policy import ServedPolicy
from inference_server.service import SERVICE_NAME, add_inference_service
from leeway.rpc import RunningServer, Security, cancel_and_wait, start_server
from leeway.service.ports import free_port
from leeway.types import PolicyVersion
from tests.harness.processes import AsyncChild, Message, preload
from tests.harness.waiting import Changes
from tests.harness.weights_engine import WeightsEngine
from tests.push.faults import PLACES
from tests.push.history import RUN
from tests.push.learner_process import learn
from tests.push.oracle import Oracle, Outcome
from tests.push.receiver_process import receive

TRANSPORTS = ("zmq", "grpc", "collective", "collective")
SETTLE_SECONDS = 120.0
_START_SECONDS = 120.0
_DEATH_SECONDS = 20.0
_PLACES = {"announce": "while it announces", "transfer": "in mid transfer", "acknowledge": "before an acknowledgement"}


class Learner:
    """The learner's incarnations, one after the other."""

    def __init__(
        self, oracle: Oracle, outcome: Outcome, changes: Changes, directory: Path, seed: int, probability: float
    ) -> None:
        self.address = f"127.0.0.1:{free_port('127.0.0.1')}"
        self.newest: PolicyVersion | None = None
        self.refusals: list[str] = []
        self.pushes = 0
        self._oracle = oracle
        self._outcome = outcome
        self._start = str(directory), seed, probability
        self._changes = changes
        self._epoch = self._starts = 0
        self._counts: Counter[str] = Counter()

    async def start(self) -> None:
        """The next incarnation, up to its first publication."""
        self._outcome.kinds += self._counts
        self._counts = Counter()
        self._epoch += 1
        self._starts += 1
        directory, seed, probability = self._start
        arguments = self.address, directory, seed, self._epoch, self._starts, probability
        self._child = AsyncChild(learn, *arguments, on_message=self._hear, on_end=self._changes.happened)
        await self._next_version()

    async def publish(self) -> None:
        """Train a step and announce it; comes back when the learner is about to, or has died."""
        self._child.send(do="publish")
        await self._next_version()

    async def die(self, where: str) -> bool:
        """Have the learner kill itself at a place of the next push; whether it has come there."""
        self._child.send(do="die", where=where)
        await self.publish()
        return await self._changes.until(self._child.ended.is_set, _DEATH_SECONDS)

    async def kill(self) -> None:
        """SIGKILL, wherever it is."""
        await self._child.kill()

    async def end_faults(self) -> None:
        """From now on nothing goes wrong."""
        self._child.send(do="end faults")

    async def end(self) -> None:
        await self.kill()
        self._outcome.kinds += self._counts

    def _hear(self, message: Message) -> None:
        if "version" in message:
            epoch, step, digest = message["version"]
            self.newest = PolicyVersion(RUN, epoch, step, bytes.fromhex(digest))
            self._oracle.registered(self.newest, message["epoch"])
            self.pushes += 1
        else:
            self._counts, self.refusals = Counter(message["counts"]), message["refusals"]
        self._changes.happened()

    async def _next_version(self) -> None:
        before = self.pushes
        if not await self._changes.until(lambda: self.pushes > before or self._child.ended.is_set(), _START_SECONDS):
            raise TimeoutError("the learner says nothing")


class Receiver:
    """A receiver process and the engine that it feeds."""

    def __init__(self, name: str, transport: str, on_update: Callable[[], None]) -> None:
        self.name = name
        self.engine = WeightsEngine(on_update)
        self._transport = transport
        self._server: RunningServer | None = None

    async def start(self, policy_address: str) -> None:
        """Serve the engine and start its first receiver."""
        services = add_inference_service(self.engine, ServedPolicy(self.engine, RUN))
        self._server = await start_server("127.0.0.1:0", services, [SERVICE_NAME], Security())
        self._policy_address = policy_address
        self._spawn()

    async def kill(self) -> None:
        """SIGKILL, and a new process."""
        await self._child.kill()
        self._spawn()

    async def stop(self) -> None:
        """End both."""
        await self._child.kill()
        assert self._server is not None
        await self._server.stop(0.0)

    def _spawn(self) -> None:
        assert self._server is not None
        arguments = self.name, f"127.0.0.1:{self._server.port}", self._policy_address, self._transport
        self._child = AsyncChild(receive, *arguments, on_message=lambda _: None)


@contextlib.asynccontextmanager
async def looking(oracle: Oracle, receivers: Sequence[Receiver]) -> AsyncGenerator[None]:
    """Look at every engine, again and again: nobody says when an engine serves what it should not."""

    async def look() -> None:
        while True:
            for receiver in receivers:
                oracle.look(receiver.name, receiver.engine)
            await asyncio.sleep(0.001)

    task = asyncio.create_task(look())
    try:
        yield
    finally:
        await cancel_and_wait(task)


async def push_under_faults(
    pushes: int, seed: int, *, fault_probability: float = 0.04, tell: Callable[[str], None] = lambda _: None
) -> Outcome:
    """Push, kill and corrupt; returns what was seen."""
    preload("tests.push.learner_process", "tests.push.receiver_process")
    outcome, changes = Outcome(), Changes()
    oracle = Oracle(outcome)
    luck = random.Random(seed)
    receivers = [Receiver(f"server-{index}", transport, changes.happened) for index, transport in enumerate(TRANSPORTS)]
    with tempfile.TemporaryDirectory() as directory:
        learner = Learner(oracle, outcome, changes, Path(directory), seed, fault_probability)
        await learner.start()
        for receiver in receivers:
            await receiver.start(learner.address)
        async with looking(oracle, receivers):
            for push in range(pushes):
                await _push(push, learner, receivers, luck, outcome, changes)
                if push % 100 == 99:
                    tell(f"{push + 1} pushes, {outcome.looks} looks, {len(outcome.violations)} violations")
            await _settle(learner, receivers, outcome, changes)
        for receiver in receivers:
            await receiver.stop()
        await learner.end()
    oracle.end()
    return outcome


async def _push(
    number: int,
    learner: Learner,
    receivers: Sequence[Receiver],
    luck: random.Random,
    outcome: Outcome,
    changes: Changes,
) -> None:
    """One push, perhaps with the death of a process before or in it."""
    if number % 20 == 10 or luck.random() < 0.02:
        await luck.choice(receivers).kill()
        outcome.kinds["receiver killed"] += 1
    updates = sum(receiver.engine.updates for receiver in receivers)
    if number % 20 == 15 or luck.random() < 0.01:
        where = [*PLACES, None][number // 20 % (len(PLACES) + 1)]
        if where is not None and await learner.die(where):
            outcome.kinds[f"learner killed {_PLACES[where]}"] += 1
        else:
            await learner.publish()
            await asyncio.sleep(0.05 * luck.random())
            await learner.kill()
            outcome.kinds["learner killed at any moment"] += 1
        await learner.start()
    else:
        await learner.publish()
    outcome.pushes += 1
    wanted = updates + luck.choice([0, 1, 2, 3, 4])
    await changes.until(lambda: sum(receiver.engine.updates for receiver in receivers) >= wanted, 0.3)


async def _settle(learner: Learner, receivers: Sequence[Receiver], outcome: Outcome, changes: Changes) -> None:
    """Without faults every engine reaches the last version, and no server refuses what it is sent."""
    await learner.end_faults()
    await learner.publish()
    if not await changes.until(lambda: all(r.engine.label == learner.newest for r in receivers), SETTLE_SECONDS):
        late = [f"{r.name} at {r.engine.label}" for r in receivers if r.engine.label != learner.newest]
        outcome.violations.append(f"not at {learner.newest} though nothing fails any more: {', '.join(late)}")
    if not await changes.until(lambda: not learner.refusals, SETTLE_SECONDS):
        outcome.violations += [f"still refuses: {refusal}" for refusal in learner.refusals]
