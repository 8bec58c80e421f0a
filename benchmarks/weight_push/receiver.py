"""An inference server's side of a push, in a process of its own.

`python -m benchmarks.weight_push.receiver --policy HOST:PORT --model DIR [--samples] [--transport zmq|grpc|collective]`
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prometheus_client import CollectorRegistry

from benchmarks.weight_push.training import RUN
from inference_server.engine import GenerationEnd, GenerationRequest
from inference_server.engines.transformers.engine import TransformersEngine
from inference_server.served_policy import ServedPolicy
from inference_server.weights.receiver import WeightReceiver
from leeway.config import TransformersEngineOptions
from leeway.huggingface import model_signature
from leeway.rpc import Security
from leeway.service.metrics import InferenceServerMetrics
from leeway.types import EngineInfo, LogprobMode, ModelSignature, SamplingParams, TrajectoryChunk, WeightSnapshot


class HostMemory:
    """Takes verified weights and does nothing with them: a push without an engine."""

    def __init__(self, signature: ModelSignature) -> None:
        self._signature = signature

    def info(self) -> EngineInfo:
        return EngineInfo(self._signature, "host-memory/1", LogprobMode.SAMPLED, None, 0, False, 1)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TrajectoryChunk | GenerationEnd, None]:
        raise NotImplementedError
        yield

    async def update_weights(self, snapshot: WeightSnapshot) -> float:
        return 0.0

    async def pause(self) -> None: ...

    async def resume(self) -> None: ...

    async def aclose(self) -> None: ...


async def keep_sampling(engine: TransformersEngine, policy: ServedPolicy, lane: int) -> None:
    """One sequence after the other, so that an update always meets work."""
    await policy.wait_for_change(None)
    number = lane
    while True:
        number += 1000
        sampling = SamplingParams(max_tokens=40, seed=number)
        request = GenerationRequest(str(number), np.arange(2, 12, dtype=np.int32), sampling)
        async for _ in engine.generate(request):
            pass


async def receive(arguments: argparse.Namespace) -> None:
    """Serve until killed."""
    engine: Any = HostMemory(model_signature(arguments.model))
    if arguments.samples:
        torch.set_num_threads(1)
        engine = TransformersEngine(arguments.model, TransformersEngineOptions())
    policy = ServedPolicy(engine, RUN)
    receiver = WeightReceiver(
        policy=policy,
        signature=engine.info().signature,
        run=RUN,
        server_id="server-0",
        address=arguments.policy,
        security=Security(),
        transports=tuple(dict.fromkeys((arguments.transport, "grpc"))),
        fetch_timeout_seconds=300.0,
        metrics=InferenceServerMetrics(CollectorRegistry()),
    )
    async with asyncio.TaskGroup() as group:
        group.create_task(receiver.run())
        if arguments.samples:
            for lane in range(4):
                group.create_task(keep_sampling(engine, policy, lane))


def main() -> None:
    """Parse and receive."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument(
        "--samples", action="store_true", help="with the transformers engine, which samples at the same time"
    )
    parser.add_argument("--transport", choices=["zmq", "grpc", "collective"], default="zmq")
    asyncio.run(receive(parser.parse_args()))


if __name__ == "__main__":
    main()
