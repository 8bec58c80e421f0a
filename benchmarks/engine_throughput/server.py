"""vLLM in its own environment: behind Leeway's InferenceService, and called directly when a line on stdin asks for it.

`python -m benchmarks.engine_throughput.server --model DIR --address HOST:PORT`. Each line on stdin is a round as JSON;
its answer is a line on stdout.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import psutil

from benchmarks.engine_throughput.requests import Round, tokens_per_second
from inference_server.engine import GenerationRequest
from inference_server.engines.vllm import engine as vllm_engine
from inference_server.served_policy import ServedPolicy
from inference_server.service import SERVICE_NAME, add_inference_service
from leeway.config import VllmEngineOptions
from leeway.conformance.weights import checkpoint_weights
from leeway.rpc import Security, start_server
from leeway.types import PolicyVersion, WeightSnapshot


async def serve(model: Path, address: str) -> None:
    """Start, and answer until stdin ends."""
    options = VllmEngineOptions(
        dtype="float32", max_concurrency=64, kv_cache_bytes=1 << 29, arguments={"enforce_eager": True}
    )
    engine = await vllm_engine.start(model, options)
    weights = checkpoint_weights(model)
    version = PolicyVersion("benchmark", 1, 0, weights.digest)
    await engine.update_weights(WeightSnapshot(version, 1, weights.manifest, weights.buffers))
    driver: Any = engine._driver
    services = add_inference_service(engine, ServedPolicy(engine, "benchmark"))
    server = await start_server(address, services, [SERVICE_NAME], Security())

    async def sample(request: GenerationRequest) -> int:
        parameters = driver._parameters(request, request.sampling.max_tokens)
        prompt = {"prompt_token_ids": request.prompt_token_ids.tolist()}
        count = 0
        async for output in driver._llm.generate(prompt, parameters, f"direct-{request.request_id}"):
            count += len(output.outputs[0].token_ids)
        return count

    say("ready")
    while line := await asyncio.to_thread(sys.stdin.readline):
        if line.strip() == "cpu":
            say(cpu_seconds())
        else:
            say(await tokens_per_second(Round(**json.loads(line)), sample))
    await server.stop(0.0)
    await engine.aclose()


def say(what: float | str) -> None:
    """Answer."""
    print(json.dumps(what), flush=True)


def cpu_seconds() -> float:
    """CPU time of this process and vLLM's."""
    seconds = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            seconds += times.user + times.system
    return seconds


def main() -> None:
    """Parse and serve."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--address", required=True)
    arguments = parser.parse_args()
    asyncio.run(serve(arguments.model, arguments.address))


if __name__ == "__main__":
    main()
