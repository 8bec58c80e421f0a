"""Pushes under kills, corruption, loss and disorder: no engine ever serves a mixture, and every label is right.

    learner (killed and restarted, at times from an older step) ── faulty gRPC and ZeroMQ ──> receivers: processes,
                                                                                  killed with SIGKILL and restarted
    engines, which outlive their receivers <── UpdateWeights ─────────────────────────────────────┘
       └── looked at all the time

`python -m tests.push --pushes 1000`. At the end the faults stop and every engine must reach the last version.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from inference_server.served_policy import ServedPolicy
from inference_server.service import SERVICE_NAME, add_inference_service
from leeway.rpc import RunningServer, Security, cancel_and_wait, start_server
from leeway.types import PolicyVersion, WeightManifest, WeightSnapshot
from leeway.weights import tensor_entry, weights_digest
from tests.push.engine import WeightsEngine
from tests.push.faults import Faults, FaultyPublisher

RUN = "push"
SIZES = (9000, 0, 700, 25_000)
SETTLE_SECONDS = 60.0


@dataclass
class Outcome:
    """What was seen."""

    pushes: int = 0
    looks: int = 0
    kinds: Counter[str] = field(default_factory=Counter[str])
    violations: list[str] = field(default_factory=list[str])


class History:
    """Weights that are trained a little in each step, sometimes thoroughly, sometimes not at all."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)
        self._words = [self._generator.integers(0, 1 << 16, size, np.uint16) for size in SIZES]
        self._steps: dict[int, list[np.ndarray]] = {0: self._words}
        self.versions: dict[PolicyVersion, WeightSnapshot] = {}

    def snapshot(self, epoch: int, step: int, publisher_epoch: int) -> WeightSnapshot:
        """The weights of a step as this incarnation publishes them."""
        buffers = [words.astype("<u2").tobytes() for words in self._words]
        manifest = WeightManifest(
            tuple(
                tensor_entry(f"t{index}", "bfloat16", (len(words),), data)
                for index, (words, data) in enumerate(zip(self._words, buffers, strict=True))
            )
        )
        version = PolicyVersion(RUN, epoch, step, weights_digest(manifest))
        self.versions[version] = WeightSnapshot(version, publisher_epoch, manifest, buffers)
        return self.versions[version]

    def train(self, step: int) -> None:
        """Change a few percent by a unit in the last place; one time in twenty everything, or nothing."""
        luck = self._generator.random()
        share = 1.0 if luck < 0.05 else 0.0 if luck < 0.1 else 0.03
        self._words = [words.copy() for words in self._words]
        for words in self._words:
            moved = self._generator.random(len(words)) < share
            spread = 1 << 16 if share == 1.0 else 3
            words[moved] += self._generator.integers(0, spread, np.count_nonzero(moved), np.uint16)
        self._steps[step] = self._words
        self._steps.pop(step - 20, None)

    def go_back(self, step: int) -> int:
        """Be at an earlier step again, the newest of those that are kept up to `step`."""
        step = max(kept for kept in self._steps if kept <= max(step, min(self._steps)))
        self._words = self._steps[step]
        return step


class Receiver:
    """A receiver process and the engine that it feeds."""

    def __init__(self, name: str, extra: list[str]) -> None:
        self.name = name
        self.engine = WeightsEngine()
        self._extra = extra
        self._server: RunningServer | None = None
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, policy_address: str) -> None:
        """Serve the engine and start its first receiver."""
        policy = ServedPolicy(self.engine, RUN)
        services = add_inference_service(self.engine, policy)
        self._server = await start_server("127.0.0.1:0", services, [SERVICE_NAME], Security())
        self._policy_address = policy_address
        await self._spawn()

    async def kill(self) -> None:
        """SIGKILL, and a new process."""
        await self._end()
        await self._spawn()

    async def stop(self) -> None:
        """End both."""
        await self._end()
        assert self._server is not None
        await self._server.stop(0.0)

    async def _end(self) -> None:
        assert self._process is not None
        self._process.kill()
        await self._process.wait()

    async def _spawn(self) -> None:
        assert self._server is not None
        backend = f"127.0.0.1:{self._server.port}"
        arguments = ["--backend", backend, "--policy", self._policy_address, "--server-id", self.name, "--run", RUN]
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.push.receiver_process", *arguments, *self._extra,
            stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip


async def _look(receivers: list[Receiver], history: History, outcome: Outcome) -> None:
    """Whatever is served at any moment is what its label says, and was published under it."""
    while True:
        for receiver in receivers:
            label = receiver.engine.label
            if label is None or receiver.engine.paused:
                continue
            outcome.looks += 1
            if label not in history.versions:
                outcome.violations.append(f"{receiver.name} serves {label}, which was never published")
            if not receiver.engine.looks_right():
                outcome.violations.append(f"{receiver.name} serves other weights than its label {label}")
        await asyncio.sleep(0.001)


async def chaos(
    pushes: int, seed: int, *, fault_probability: float = 0.04, tell: Callable[[str], None] = lambda _: None
) -> Outcome:
    """Push, kill, spoil; what was seen."""
    faults = Faults(seed, fault_probability)
    history, outcome = History(seed), Outcome()
    receivers = [Receiver("server-0", []), Receiver("server-1", ["--grpc"]), Receiver("server-2", [])]
    epoch, step = 1, 0
    publisher = FaultyPublisher(RUN, faults)
    address = await publisher.start("127.0.0.1:0")
    await publisher.publish(history.snapshot(epoch, step, epoch))
    for receiver in receivers:
        await receiver.start(address)
    looking = asyncio.create_task(_look(receivers, history, outcome))
    try:
        for push in range(pushes):
            if push % 20 == 10 or faults.random.random() < 0.02:
                victim = faults.random.choice(receivers)
                await victim.kill()
                faults.counts["receiver killed"] += 1
            if push % 40 == 25 or faults.random.random() < 0.01:
                _collect(publisher, outcome)
                await publisher.die()
                faults.counts["learner killed"] += 1
                step, epoch = history.go_back(step - faults.random.randrange(4)), epoch + 1
                publisher = FaultyPublisher(RUN, faults)
                await publisher.start(address)
                await publisher.publish(history.snapshot(epoch, step, epoch))
            step += 1
            history.train(step)
            updates = sum(receiver.engine.updates for receiver in receivers)
            await publisher.publish(history.snapshot(epoch, step, epoch))
            outcome.pushes += 1
            wanted = updates + faults.random.choice([0, 1, 2, 3])
            await _until(lambda n=wanted: sum(receiver.engine.updates for receiver in receivers) >= n, 0.3)
            if push % 100 == 99:
                tell(f"{push + 1} pushes, {outcome.looks} looks, {len(outcome.violations)} violations")
        faults.probability = 0.0
        history.train(step + 1)
        last = history.snapshot(epoch, step + 1, epoch)
        await publisher.publish(last)
        if not await _until(lambda: all(r.engine.label == last.version for r in receivers), SETTLE_SECONDS):
            late = [f"{r.name} at {r.engine.label}" for r in receivers if r.engine.label != last.version]
            outcome.violations.append(f"not at {last.version} though nothing fails any more: {', '.join(late)}")
        await _until(lambda: not any(s.refusal for s in publisher._servers.values()), 5.0)
        for name, server in publisher._servers.items():
            if server.refusal:
                outcome.violations.append(f"{name} still refuses: {server.refusal}")
        _collect(publisher, outcome)
    finally:
        await cancel_and_wait(looking)
        for receiver in receivers:
            await receiver.stop()
        await publisher.die()
    outcome.kinds += faults.counts
    return outcome


async def _until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():
        if asyncio.get_running_loop().time() > deadline:
            return False
        await asyncio.sleep(0.002)
    return True


def _collect(publisher: FaultyPublisher, outcome: Outcome) -> None:
    """What this learner sent, by kind."""
    for family in publisher._metrics.published_bytes.collect():
        for sample in family.samples:
            if sample.name.endswith("_total"):
                key = f"KiB as {sample.labels['kind']} over {sample.labels['transport']}"
                outcome.kinds[key] += round(sample.value / 1024)
    outcome.kinds["acknowledgements"] += len(publisher.acknowledged)
