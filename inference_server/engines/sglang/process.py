"""SGLang's server as a child process: how it is started, waited for and ended."""
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
from leeway.service.ports import free_port
from leeway.types import ModelSignature

_PROBE_SECONDS: Final = 0.5
_STOP_SECONDS: Final = 10.0
# SGLang leaves the last tokens of a context unused. These are added; requests are checked against the real length.
_UNUSED_TOKENS: Final = 8
_HOST: Final = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class SglangProcess:
    """A running server, with everything that it has started as its group."""

    process: asyncio.subprocess.Process
    url: str

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the group, if there still is one."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    async def end(self) -> None:
        """End the server, by force if it takes too long."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            self.signal(number)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_STOP_SECONDS):
                    await self.process.wait()


async def start_process(model_path: Path, options: SglangEngineOptions, signature: ModelSignature) -> SglangProcess:
    """Start the server and wait until it answers.

    Raises:
        ConfigError: it refuses the model or its arguments.
        DeadlineError: it did not answer in time.
    """
    port = free_port(_HOST)
    command, environment = _command_line(model_path, options, signature, port)
    process = await asyncio.create_subprocess_exec(
        *command,
        env=environment,
        stdout=sys.stderr,
        stderr=sys.stderr,
        start_new_session=True,  # it is ended as a group
    )
    child = SglangProcess(process, f"http://{_HOST}:{port}")
    try:
        await _answering(child, options.start_timeout_seconds)
    except BaseException:
        await child.end()
        raise
    return child


def _command_line(
    model_path: Path, options: SglangEngineOptions, signature: ModelSignature, port: int
) -> tuple[list[str], dict[str, str]]:
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
    command = [sys.executable, "-m", module, str(os.getpid())]
    for name, value in arguments.items():
        command += [f"--{name}", str(value)]
    command += [f"--{flag}" for flag in flags] + list(options.arguments)
    environment = dict(os.environ) | {"HF_HUB_OFFLINE": "1", "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}
    return command, environment | ({"SGLANG_USE_CPU_ENGINE": "1"} if on_cpu else {})


async def _answering(child: SglangProcess, timeout_seconds: float) -> None:
    """Wait until the server answers. It has no way to say so but to be asked again and again.

    Raises:
        ConfigError: it ended.
        DeadlineError: it did not answer in time.
    """
    try:
        async with asyncio.timeout(timeout_seconds), aiohttp.ClientSession() as session:
            while True:
                if child.process.returncode is not None:
                    raise ConfigError(f"SGLang ended with code {child.process.returncode}; its log says why")
                with contextlib.suppress(aiohttp.ClientError, ConnectionError):
                    async with session.get(f"{child.url}/health") as response:
                        if response.status == 200:
                            return
                await asyncio.sleep(_PROBE_SECONDS)
    except TimeoutError as error:
        raise DeadlineError(f"SGLang did not answer within {timeout_seconds:g} s") from error
