"""What a weight push costs, in bytes and in time: ratios from one run, medians.

    python -m benchmarks.weight_push --output build/weight_push

1. Bytes. The shipped sortmix8 model (mixture of experts, 541k parameters) is trained for some steps at 5e-4, then goes
   on at 1e-6 and at 1e-5: groups sampled by the transformers engine, dppo-binary-tv, AdamW. Each version's delta and
   announcement over its snapshot. The same for a larger dense model from random weights.
2. Time on one host, with the larger model: a full push over ZeroMQ and one as a broadcast, from `publish` to the
   acknowledgement, every digest checked, beside a bare gloo broadcast of the same bytes in turn (see broadcast.py); and
   delta pushes into a transformers engine that goes on sampling: how long it stands still, as a part of the whole
   update, encoding included. Beside the seconds that pass stand those of CPU, of both processes together: where other
   work shares the machine, only these mean something. SHA-256 is most of the difference to the bare broadcast, and
   runs beside the transfer only where a core is free.
3. Time over a link of 100 Mbit/s (a proxy), gRPC: full pushes beside delta pushes of the same versions, with the larger
   model and one of a fifth of its size.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from prometheus_client import CollectorRegistry

from benchmarks.promise import Promise
from benchmarks.weight_push.broadcast import Broadcast
from benchmarks.weight_push.training import EXAMPLE, RUN, any_reward, larger_model, real_steps, sorted_reward
from learner.weights.outlets import WeightOutlet
from learner.weights.publication import Publication
from learner.weights.publisher import Publisher, _Server
from leeway.huggingface import model_signature
from leeway.rpc import Security, start_server
from leeway.service.metrics import LearnerMetrics
from leeway.service.ports import free_port
from leeway.types import WeightSnapshot
from leeway.v1 import policy_pb2, policy_pb2_grpc
from leeway.weights.transports import TRANSPORTS, load_side

ROOT = Path(__file__).parents[2]
RATES = (1e-6, 1e-5)
MEGABITS = 100.0
ACKNOWLEDGED_SECONDS = 120.0
Transport = Literal["zmq", "grpc", "collective"]
FULL_TRANSPORTS: tuple[Transport, ...] = ("zmq", "collective")


@dataclass(frozen=True)
class Push:
    """One push as the learner sees it."""

    seconds: float  # publish to acknowledgement, encoding included
    paused_seconds: float
    sent_bytes: int
    cpu_seconds: float  # of the learner's process and the server's


class TimedPublisher(Publisher):
    """Says when its one server has acknowledged."""

    def __init__(self, model: Path, transport: Transport, max_delta_chain: int) -> None:
        metrics = LearnerMetrics(CollectorRegistry())
        outlet = TRANSPORTS[transport].outlet
        self._sending: list[WeightOutlet] = [load_side(outlet)(metrics, "127.0.0.1", 10.0)] if outlet else []
        super().__init__(RUN, model_signature(model), metrics, self._sending, max_delta_chain)
        self._acknowledgements: asyncio.Queue[tuple[float, policy_pb2.PolicyAcknowledgement]] = asyncio.Queue()
        self.server_process = 0

    def _acknowledged(self, server_id: str, server: _Server, message: policy_pb2.PolicyAcknowledgement) -> None:
        super()._acknowledged(server_id, server, message)
        self._acknowledgements.put_nowait((time.perf_counter(), message))

    async def push(self, snapshot: WeightSnapshot) -> Push:
        """Publish and wait for the acknowledgement."""
        sent, cpu_began = self._sent_bytes(), self._cpu_seconds()
        began = time.perf_counter()
        await self.publish(snapshot)
        async with asyncio.timeout(ACKNOWLEDGED_SECONDS):
            ended, message = await self._acknowledgements.get()
        paused = message.paused.ToTimedelta().total_seconds()
        cpu_seconds = self._cpu_seconds() - cpu_began
        return Push(ended - began, paused, self._sent_bytes() - sent, cpu_seconds)

    def _cpu_seconds(self) -> float:
        return time.process_time() + process_cpu_seconds(self.server_process)

    def _sent_bytes(self) -> int:
        samples = [sample for family in self._metrics.published_bytes.collect() for sample in family.samples]
        return int(sum(sample.value for sample in samples if sample.name.endswith("_total")))

    async def aclose(self) -> None:
        """Release what it sends with."""
        for outlet in self._sending:
            await outlet.aclose()


@asynccontextmanager
async def one_server(
    model: Path,
    first: WeightSnapshot,
    *,
    max_delta_chain: int,
    transport: Transport = "zmq",
    megabits: float = 0.0,
    samples: bool = False,
) -> AsyncGenerator[TimedPublisher]:
    """A publisher and one receiver in a process of its own, which has acknowledged the first version."""
    publisher = TimedPublisher(model, transport, max_delta_chain)
    server = await start_server(
        "127.0.0.1:0", lambda s: policy_pb2_grpc.add_PolicyServiceServicer_to_server(publisher, s), [], Security()
    )
    port, processes = server.port, []
    try:
        if megabits:
            command = ["benchmarks.weight_push.link", "--to", str(port), "--megabits", str(megabits)]
            processes.append(spawn(*command, stdout=subprocess.PIPE))
            port = int(await asyncio.to_thread(processes[0].stdout.readline))
        flags = ["--transport", transport, *["--samples"] * samples]
        command = ["benchmarks.weight_push.receiver", "--policy", f"127.0.0.1:{port}", "--model", str(model), *flags]
        processes.append(spawn(*command))
        publisher.server_process = processes[-1].pid
        await publisher.push(first)
        yield publisher
    finally:
        for process in processes:
            process.kill()
            process.wait()
        await server.stop(0.0)
        await publisher.aclose()


def spawn(module: str, *arguments: str, stdout: int | None = None) -> subprocess.Popen[bytes]:
    """A process of this benchmark."""
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=stdout)


def relabelled(snapshots: Sequence[WeightSnapshot], count: int) -> list[WeightSnapshot]:
    """`count` versions with rising steps, from the given ones in turn."""
    chosen = [snapshots[index % len(snapshots)] for index in range(count)]
    return [replace(s, version=replace(s.version, step=index + 1)) for index, s in enumerate(chosen)]


def delta_ratios(versions: Sequence[WeightSnapshot]) -> tuple[list[float], float]:
    """Each step's delta over its snapshot, and an announcement's bytes over it."""
    ratios: list[float] = []
    publication = Publication(versions[0])
    for version in versions[1:]:
        publication = Publication(publication.snapshot).followed_by(version, 1)
        size_bytes = publication.deltas[0].size_bytes if publication.deltas else version.manifest.size_bytes
        ratios.append(size_bytes / version.manifest.size_bytes)
    publisher = Publisher(RUN, None, LearnerMetrics(CollectorRegistry()))  # type: ignore[arg-type]
    announcement = publisher._announcement(publication, _Server()).ByteSize()
    return ratios, announcement / versions[0].manifest.size_bytes


async def on_one_host(model: Path, versions: Sequence[WeightSnapshot], rounds: int) -> dict[str, list[float]]:
    """Full pushes and broadcasts in turn; then delta pushes into an engine at work."""
    figures: dict[str, list[float]] = defaultdict(list)
    sizes = [entry.size_bytes for entry in versions[0].manifest.tensors]
    port = free_port("127.0.0.1")
    arguments = ["--rank", "1", "--port", str(port), "--rounds", str(rounds + 1), "--sizes", *map(str, sizes)]
    peer = spawn("benchmarks.weight_push.broadcast", *arguments)
    broadcast = await asyncio.to_thread(Broadcast, 0, port, sizes)
    await asyncio.to_thread(broadcast.rounds)
    async with AsyncExitStack() as stack:
        publishers = {
            transport: await stack.enter_async_context(
                one_server(model, versions[0], max_delta_chain=0, transport=transport)
            )
            for transport in FULL_TRANSPORTS
        }
        for version in relabelled(versions, rounds):
            cpu_began = time.process_time() + process_cpu_seconds(peer.pid)
            by_tensor, at_once = await asyncio.to_thread(broadcast.rounds)
            cpu_seconds = time.process_time() + process_cpu_seconds(peer.pid) - cpu_began
            figures["gloo by tensor"].append(by_tensor)
            figures["gloo at once"].append(at_once)
            figures["gloo by tensor and at once, CPU"].append(cpu_seconds)
            for transport, publisher in publishers.items():
                push = await publisher.push(version)
                figures[f"full, {transport}"].append(push.seconds)
                figures[f"full, {transport}, CPU"].append(push.cpu_seconds)
    broadcast.close()
    peer.wait(timeout=60)
    async with one_server(model, versions[0], max_delta_chain=8, samples=True) as publisher:
        for version in versions[1:]:
            push = await publisher.push(version)
            figures["delta"].append(push.seconds)
            figures["delta, CPU, sampling included"].append(push.cpu_seconds)
            figures["paused"].append(push.paused_seconds)
            figures["paused part"].append(push.paused_seconds / push.seconds)
    return figures


async def over_a_link(model: Path, versions: Sequence[WeightSnapshot], rounds: int) -> dict[str, list[float]]:
    """Full and delta pushes of the same versions over a slow link."""
    figures: dict[str, list[float]] = {"full": [], "delta": []}
    async with one_server(model, versions[0], max_delta_chain=0, transport="grpc", megabits=MEGABITS) as publisher:
        for version in versions[1 : 1 + rounds]:
            figures["full"].append((await publisher.push(version)).seconds)
    async with one_server(model, versions[0], max_delta_chain=8, transport="grpc", megabits=MEGABITS) as publisher:
        for version in versions[1:]:
            figures["delta"].append((await publisher.push(version)).seconds)
    return figures


def process_cpu_seconds(process_id: int) -> float:
    """User and system time of another process so far."""
    fields = Path(f"/proc/{process_id}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def spread(values: Sequence[float], layout: str = ".4f") -> str:
    """Median [least, most]."""
    return f"{statistics.median(values):{layout}} [{min(values):{layout}}, {max(values):{layout}}]"


async def measure(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[Promise]]:
    """Everything; figures and promises."""
    torch.set_num_threads(arguments.threads)
    results: dict[str, Any] = {}
    promises: list[Promise] = []
    sortmix8 = await real_steps(
        EXAMPLE / "model-moe", RATES, groups=24, members=8,
        first_steps=arguments.first_steps, steps=arguments.steps, reward=sorted_reward,
    )  # fmt: skip
    model = larger_model(arguments.output / "model", arguments.hidden, arguments.layers)
    larger = await real_steps(model, RATES, groups=2, members=4, first_steps=0, steps=6, reward=any_reward)
    limits = dict(zip(RATES, (0.03, 0.12), strict=True))
    for name, steps in (("sortmix8", sortmix8), ("larger dense", larger)):
        for rate, versions in steps.items():
            ratios, announcement = delta_ratios(versions)
            megabytes = versions[0].manifest.size_bytes / 1e6
            print(
                f"{name}, {megabytes:.1f} MB, lr {rate:g}: delta over snapshot {spread(ratios)}, "
                f"announcement {announcement:.4f}, {len(ratios)} steps",
                flush=True,
            )
            results[f"bytes {name} {rate:g}"] = ratios
            what = f"of a full push's bytes, announcement included, {name}, lr {rate:g}"
            promises.append(Promise(what, statistics.median(ratios) + announcement, limits[rate]))
    host = await on_one_host(model, larger[1e-6], arguments.rounds)
    results["host"] = host
    for name, values in host.items():
        print(f"one host, {name}: {spread(values)}{'' if 'part' in name else ' s'}", flush=True)
    for transport in FULL_TRANSPORTS:
        ratios = [full / other for full, other in zip(host[f"full, {transport}"], host["gloo by tensor"], strict=True)]
        promises.append(
            Promise(f"full push ({transport}) over a gloo broadcast by tensor", statistics.median(ratios), 1.5)
        )
    promises.append(Promise("of a delta push generation is paused", statistics.median(host["paused part"]), 0.1))
    small = larger_model(arguments.output / "small", arguments.small_hidden, arguments.small_layers)
    smaller = await real_steps(small, RATES[:1], groups=2, members=4, first_steps=0, steps=6, reward=any_reward)
    for folder, versions in ((small, smaller[1e-6]), (model, larger[1e-6])):
        link = await over_a_link(folder, versions, 2)
        size = f"{versions[0].manifest.size_bytes / 1e6:.0f} MB"
        results[f"link {size}"] = link
        for name, seconds in link.items():
            print(f"{MEGABITS:g} Mbit/s, {size}, {name}: {spread(seconds)} s", flush=True)
        faster = statistics.median(link["full"]) / statistics.median(link["delta"])
        what = f"full over delta push at {MEGABITS:g} Mbit/s, {size}, lr 1e-06"
        promises.append(Promise(what, faster, 10.0, at_least=True))
    return results, promises


def main() -> int:
    """Run, print figures and promises; exit 1 if one is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/weight_push"), help="folder for the larger model")
    parser.add_argument("--first-steps", type=int, default=20, help="steps at 5e-4 before those that are measured")
    parser.add_argument("--steps", type=int, default=12, help="measured steps at each learning rate")
    parser.add_argument("--rounds", type=int, default=9, help="full pushes and broadcasts")
    parser.add_argument("--hidden", type=int, default=640, help="width of the larger model")
    parser.add_argument("--layers", type=int, default=8, help="depth of the larger model")
    parser.add_argument("--small-hidden", type=int, default=256, help="width of the smaller dense model")
    parser.add_argument("--small-layers", type=int, default=9, help="depth of the smaller dense model")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of the trainer")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    arguments.output.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    results, promises = asyncio.run(measure(arguments))
    (arguments.output / "result.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"\n{time.perf_counter() - began:.0f} s\n" + "\n".join(map(str, promises)))
    return 0 if all(promise.kept for promise in promises) else 1


if __name__ == "__main__":
    sys.exit(main())
