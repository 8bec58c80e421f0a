"""SGLang's server as a child process: its command line, its start and its end."""
# aiohttp comes with SGLang, which is not installed where types are checked.
# pyright: reportMissingImports=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import aiohttp
import torch

from leeway.config import SglangEngineOptions
from leeway.errors import ConfigError, DeadlineError
from leeway.service.children import Child, python_command, start
from leeway.service.ports import free_port
from leeway.types import ModelSignature

_PROBE_SECONDS: Final = 0.5
_STOP_SECONDS: Final = 10.0
# SGLang leaves the last tokens of a context unused. These are added; requests are checked against the real length.
_UNUSED_TOKENS: Final = 8
_HOST: Final = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class SglangProcess:
    """A running server, with every process that it has started as its group."""

    child: Child
    url: str

    async def end(self) -> None:
        """End the server and its group, by force if it takes too long."""
        self.child.signal_group(signal.SIGTERM)
        await self.child.stop(_STOP_SECONDS)


async def start_process(model_path: Path, options: SglangEngineOptions, signature: ModelSignature) -> SglangProcess:
    """Start the server and wait until it answers.

    Raises:
        ConfigError: it refuses the model or its arguments.
        DeadlineError: it did not answer in time.
    """
    port = free_port(_HOST)
    command, environment = _command_line(model_path, options, signature, port)
    child = await start(command, on_stdout=sys.stderr, on_stderr=sys.stderr, environment=environment)
    server = SglangProcess(child, f"http://{_HOST}:{port}")
    try:
        await child.unless_ended(_answers(server.url, options.start_timeout_seconds))
        if child.exit_code is not None:
            raise ConfigError(f"SGLang ended with code {child.exit_code}; its log says why")
    except BaseException:
        await server.end()
        raise
    return server


def _command_line(
    model_path: Path, options: SglangEngineOptions, signature: ModelSignature, port: int
) -> tuple[tuple[str, ...], dict[str, str]]:
    on_cpu = not torch.cuda.is_available()
    module = "inference_server.engines.sglang.cpu_shim" if on_cpu else "inference_server.engines.sglang.server"
    context_length = options.context_length or signature.context_length
    arguments = {
        "model-path": model_path,
        "host": _HOST,  # its administration has no other protection
        "port": port,
        "dtype": options.dtype,
        "context-length": context_length + _UNUSED_TOKENS,
        "max-running-requests": options.max_concurrency,
        "stream-interval": options.chunk_tokens,
        "tensor-parallel-size": options.tensor_parallel_size,
        "grammar-backend": "none",
    }
    flags = ["skip-tokenizer-init", "incremental-streaming-output", "enable-metrics"]
    if signature.moe_layers:
        flags.append("enable-return-routed-experts")
    if options.max_cached_tokens is not None:
        arguments["max-total-tokens"] = options.max_cached_tokens
    if on_cpu:
        arguments |= {"device": "cpu", "attention-backend": "torch_native", "sampling-backend": "pytorch"}
        flags += ["disable-overlap-schedule", "disable-cuda-graph", "sleep-on-idle"]
    command = [str(os.getpid())]
    for name, value in arguments.items():
        command += [f"--{name}", str(value)]
    command += [f"--{flag}" for flag in flags] + list(options.arguments)
    environment = {"HF_HUB_OFFLINE": "1", "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}
    return python_command(module, *command), environment | ({"SGLANG_USE_CPU_ENGINE": "1"} if on_cpu else {})


async def _answers(url: str, timeout_seconds: float) -> None:
    """Wait until the server answers. It does not announce that, so it is asked again and again.

    Raises:
        DeadlineError: it did not answer in time.
    """
    try:
        async with asyncio.timeout(timeout_seconds), aiohttp.ClientSession() as session:
            while True:
                with contextlib.suppress(aiohttp.ClientError, ConnectionError):
                    async with session.get(f"{url}/health") as response:
                        if response.status == 200:
                            return
                await asyncio.sleep(_PROBE_SECONDS)
    except TimeoutError as error:
        raise DeadlineError(f"SGLang did not answer within {timeout_seconds:g} s") from error
