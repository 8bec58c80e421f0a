"""The SGLang engine: SGLang's own server as a child process, spoken to over HTTP on the loopback.

    generate ── slot ──> POST /generate ══ events of a stream ══> chunks; routing and version spans with the last one
    update_weights ── staged folder, pause, /update_weights_from_disk with a label, go on
    retractions that a completion reports ──> concurrency limit;  end of the child ──> watch

Log-probs include the temperature, and requests have no other transform, so they are those of the distribution sampled
from. An id outside the vocabulary would end SGLang, and it ignores what it does not know: requests are checked here.

Keys and values across a swap, `kv_on_update`, are as in `vllm_engine`: `keep` pauses in place, so running sequences go
on with the keys of the old weights, mu is exact and a token's routing is that of its only forward; `recompute` retracts
them, and they are computed again with the new weights. The prefix cache is salted with the label of the version.

A request that names stop tokens is also stopped by the end-of-sequence tokens that the model's files name: SGLang has
no way to say otherwise.

The child's end is the engine's: weights are lost with it, the process ends and a new one joins like any late server. A
swap that fails halfway counts as that too, since what is left may be a mixture.
"""
# aiohttp comes with SGLang, which is not installed where types are checked.
# pyright: reportMissingImports=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final
from urllib.request import urlopen

import aiohttp
import numpy as np
import torch
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from inference_server.engine import GenerationEnd, GenerationRequest
from inference_server.engines.concurrency import ConcurrencyLimit, EngineLoad
from inference_server.engines.sglang_options import SglangEngineOptions
from inference_server.engines.staged_weights import staged_weights
from inference_server.requests import check_request
from leeway.errors import ConfigError, DeadlineError, FencedError, InvalidDataError, PreconditionError, UnavailableError
from leeway.huggingface import check_published, model_outline, model_signature
from leeway.ports import free_port
from leeway.types import (
    Column,
    ColumnKind,
    EngineInfo,
    FinishReason,
    LogprobMode,
    ModelSignature,
    PolicyVersion,
    TrajectoryChunk,
    VersionSpan,
    WeightSnapshot,
)

_PROBE_SECONDS: Final = 0.5
_STOP_SECONDS: Final = 10.0
_HOST: Final = "127.0.0.1"
_EVENT: Final = b"data: "
_LAST_EVENT: Final = b"data: [DONE]"
_MAX_LINE_BYTES: Final = 1 << 28  # the last event carries a sequence's routing


@dataclass(frozen=True, slots=True)
class _Child:
    process: asyncio.subprocess.Process
    url: str


class SglangEngine:
    """An Engine over SGLang; made by `start`, used from one event loop."""

    def __init__(
        self, child: _Child, signature: ModelSignature, model_path: Path, options: SglangEngineOptions
    ) -> None:
        self._child = child
        self._signature = signature
        self._model_path = model_path
        self._outline = model_outline(model_path)
        self._options = options
        self._name = f"sglang/{version('sglang')}"
        self._limit = ConcurrencyLimit(options.max_concurrency, options.max_queued)
        self._context_length = options.context_length or signature.context_length
        self._routing_dtype = np.dtype(np.uint8 if signature.experts <= 256 else np.uint16)
        # No deadline over a whole generation, which is its caller's to bound.
        self._session = aiohttp.ClientSession(
            child.url, timeout=aiohttp.ClientTimeout(total=None), read_bufsize=_MAX_LINE_BYTES
        )
        self._versions: dict[int, PolicyVersion] = {}  # by label; those that open requests may still name
        self._label = 0
        self._highest_epoch = 0
        self._numbers = itertools.count()
        self._open: dict[str, int] = {}  # requests in SGLang, with the label they started under
        self._swapping = asyncio.Lock()
        self._admitting = asyncio.Event()  # not while weights are swapped
        self._admitting.set()
        self._paused = False
        self._failure: UnavailableError | None = None

    @classmethod
    async def start(cls, model_path: Path, options: SglangEngineOptions) -> SglangEngine:
        """Start SGLang's server and wait until it answers; takes minutes for a large model.

        Raises:
            ConfigError: the directory is no model, or SGLang refuses the model or its arguments.
            DeadlineError: it did not answer in time.
        """
        signature = model_signature(model_path)
        if options.context_length is not None and options.context_length > signature.context_length:
            raise ConfigError(
                f"context_length {options.context_length} is more than the model's {signature.context_length}; "
                "lower it or leave it unset"
            )
        port = free_port(_HOST)
        command, environment = _command_line(model_path, options, signature, port)
        process = await asyncio.create_subprocess_exec(
            *command,
            env=environment,
            stdout=sys.stderr,
            stderr=sys.stderr,
            start_new_session=True,  # it is ended as a group
        )
        child = _Child(process, f"http://{_HOST}:{port}")
        try:
            await _answering(child, options.start_timeout_seconds)
            return cls(child, signature, model_path, options)
        except BaseException:
            await _end(process)
            raise

    def info(self) -> EngineInfo:
        return EngineInfo(
            signature=self._signature,
            engine=self._name,
            logprob_mode=LogprobMode.SAMPLED,
            version=self._versions.get(self._label),
            max_topk=min(self._options.max_topk, self._signature.vocab_size),
            routing=self._signature.moe_layers > 0,
            max_concurrency=self._limit.limit,
        )

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TrajectoryChunk | GenerationEnd, None]:
        """Sample one completion; what is wrong with the request is raised here, before SGLang sees it.

        Raises:
            InvalidDataError: ids outside the vocabulary, which would end SGLang; an empty or over-long prompt.
            UnavailableError: from the iterator: SGLang stops or has failed, or has no version yet.
            ExhaustedError: from the iterator: too many requests wait.
        """
        check_request(request, self.info())
        if len(request.prompt_token_ids) + 1 > self._context_length:
            raise InvalidDataError(
                f"a prompt of {len(request.prompt_token_ids)} tokens leaves no room to sample in a context of "
                f"{self._context_length}"
            )
        return self._stream(request)

    async def update_weights(self, snapshot: WeightSnapshot) -> float:
        """Stage a folder beside the running model, pause, swap, go on; returns the seconds decoding stood still.

        Raises:
            FencedError: a higher publisher epoch has been seen.
            PreconditionError: names or shapes are not the model's, or there is no room to stage; the old weights stay.
            UnavailableError: SGLang failed while it swapped; nothing is sampled any more.
        """
        # Once begun, a swap goes on to its end, whatever becomes of its caller.
        return await asyncio.shield(asyncio.create_task(self._update(snapshot), name="swap weights"))

    async def pause(self) -> None:
        async with self._swapping:
            await self._command("/pause_generation", {"mode": "in_place"})
            self._paused = True

    async def resume(self) -> None:
        async with self._swapping:
            self._paused = False
            await self._command("/continue_generation", {})

    async def watch(self) -> None:
        """Wait until SGLang has died.

        Raises:
            UnavailableError: it has.
        """
        # No deadline: it is hoped to live as long as this process.
        code = await self._child.process.wait()
        raise self._fail(f"SGLang has died with code {code}; its log says why")

    def collectors(self) -> list[Collector]:
        """SGLang's own metrics."""
        return [_SglangMetrics(self._child.url)]

    async def aclose(self) -> None:
        self._failure = self._failure or UnavailableError("the engine stops; send the request to another server")
        await _end(self._child.process)  # which ends every stream
        await self._session.close()

    # One completion

    async def _stream(self, request: GenerationRequest) -> AsyncGenerator[TrajectoryChunk | GenerationEnd, None]:
        self._require_weights()
        async with self._limit.slot():
            await self._admitting.wait()  # no deadline of its own: each command of a swap has one
            self._require_weights()
            request_id = f"{request.request_id}-{next(self._numbers)}"
            self._open[request_id] = self._label
            finished = False
            try:
                async for item in self._sample(request, request_id):
                    finished = isinstance(item, GenerationEnd)
                    yield item
            except (aiohttp.ClientError, ConnectionError, ValueError) as error:
                raise self._fail(f"SGLang failed while it sampled: {_one_line(error)}") from error
            finally:
                del self._open[request_id]
                if not finished and self._failure is None:
                    await self._abort(request_id)

    async def _sample(
        self, request: GenerationRequest, request_id: str
    ) -> AsyncGenerator[TrajectoryChunk | GenerationEnd, None]:
        started_at = datetime.now(UTC)
        sampling, num_prompt = request.sampling, len(request.prompt_token_ids)
        length = num_prompt
        async with self._session.post("/generate", json=self._body(request, request_id)) as response:
            if response.status != 200:
                raise InvalidDataError(f"SGLang refuses the request: {(await response.text())[:500]}")
            async for event in _events(response):
                if "error" in event:
                    raise UnavailableError(f"SGLang failed while it sampled: {event['error']}")
                said: Mapping[str, Any] = event["meta_info"]
                columns = _columns(event["output_ids"], said, length, sampling.topk)
                length += len(event["output_ids"])
                finish = said.get("finish_reason")
                if finish is None:
                    if columns:
                        yield TrajectoryChunk(columns=tuple(columns))
                    continue
                reason = _finish_reason(finish["type"], length - num_prompt == sampling.max_tokens)
                if reason is not FinishReason.ABORTED:
                    spans = self._spans(said["weight_versions"], num_prompt, length)
                    if sampling.routing:
                        columns.append(self._routing_column(said.get("routed_experts"), length))
                    yield TrajectoryChunk(columns=tuple(columns), version_spans=spans)
                retracted = 0 if self._options.kv_on_update == "recompute" else int(said.get("num_retractions", 0))
                self._limit.observe(EngineLoad(len(self._open), 0, 0.0, retracted))
                yield GenerationEnd(reason, length - num_prompt, started_at, datetime.now(UTC))
                return
        raise UnavailableError("SGLang ended a stream without saying why")

    def _body(self, request: GenerationRequest, request_id: str) -> dict[str, Any]:
        sampling = request.sampling
        room = self._context_length - len(request.prompt_token_ids)
        return {
            "rid": request_id,
            "input_ids": request.prompt_token_ids.tolist(),
            "sampling_params": {
                "temperature": sampling.temperature,
                "max_new_tokens": min(sampling.max_tokens, room),
                "stop_token_ids": list(sampling.stop_token_ids),
                "ignore_eos": not sampling.stop_token_ids,  # with it, SGLang ignores the request's own stop tokens too
                "no_stop_trim": True,
                "sampling_seed": sampling.seed & 0x7FFF_FFFF,
            },
            "stream": True,
            "return_logprob": True,
            "logprob_start_len": -1,
            "top_logprobs_num": sampling.topk,
            "return_routed_experts": sampling.routing,
            "cache_salt": str(self._label),
        }

    async def _abort(self, request_id: str) -> None:
        with contextlib.suppress(aiohttp.ClientError, ConnectionError):  # then it has ended with SGLang
            async with self._session.post("/abort_request", json={"rid": request_id}):
                pass

    def _spans(self, labelled: Any, num_prompt: int, length: int) -> tuple[VersionSpan, ...]:  # noqa: ANN401
        spans = tuple(
            VersionSpan(num_prompt + span["start"], num_prompt + span["end"], self._versions[int(span["version"])])
            for span in labelled or ()
            if span["start"] < span["end"]
        )
        if not spans or spans[-1].end_token != length:
            raise UnavailableError(f"SGLang labelled no version of token {length - 1}")
        return spans

    def _routing_column(self, encoded: str | None, length: int) -> Column:
        shape = (length - 1, self._signature.moe_layers, self._signature.experts_per_token)
        rows = np.frombuffer(base64.b64decode(encoded or ""), "<i4")
        if rows.size != np.prod(shape):
            raise PreconditionError(f"SGLang recorded {rows.size} numbers as routing where {list(shape)} was expected")
        return Column(ColumnKind.ROUTING, 0, length - 1, rows.reshape(shape).astype(self._routing_dtype))

    # New weights

    async def _update(self, snapshot: WeightSnapshot) -> float:
        async with self._swapping:
            if snapshot.publisher_epoch < self._highest_epoch:
                raise FencedError(
                    f"weights of publisher epoch {snapshot.publisher_epoch} are refused: "
                    f"epoch {self._highest_epoch} took over"
                )
            self._highest_epoch = snapshot.publisher_epoch
            if snapshot.version == self._versions.get(self._label):
                return 0.0
            check_published(self._outline, {entry.name: entry.shape for entry in snapshot.manifest.tensors})
            staging = staged_weights(snapshot, self._options.staging_directory)
            folder = await asyncio.to_thread(staging.__enter__)
            self._admitting.clear()
            try:
                shutil.copyfile(self._model_path / "config.json", folder / "config.json")
                return await self._swap(snapshot.version, folder)
            finally:
                self._admitting.set()
                await asyncio.to_thread(staging.__exit__, None, None, None)

    async def _swap(self, version: PolicyVersion, folder: Path) -> float:
        stopped_at = time.perf_counter()
        recompute = self._options.kv_on_update == "recompute"
        label = self._label + 1
        await self._command("/pause_generation", {"mode": "retract" if recompute else "in_place"})
        await self._command(
            "/update_weights_from_disk",
            {"model_path": str(folder), "weight_version": str(label), "flush_cache": recompute},
        )
        still_named = min(self._open.values(), default=self._label)
        self._versions = {old: named for old, named in self._versions.items() if old >= still_named}
        self._versions[label] = version
        self._label = label
        if not self._paused:
            await self._command("/continue_generation", {})
        return time.perf_counter() - stopped_at

    async def _command(self, path: str, body: Mapping[str, Any]) -> None:
        """Send one of SGLang's commands; when it fails, so has the engine."""
        try:
            async with asyncio.timeout(self._options.command_timeout_seconds):
                async with self._session.post(path, json=body) as response:
                    said = await response.text()
        except TimeoutError as error:
            message = f"SGLang did not answer {path} within {self._options.command_timeout_seconds:g} s"
            self._fail(message)
            raise DeadlineError(message) from error
        except (aiohttp.ClientError, ConnectionError) as error:
            raise self._fail(f"SGLang failed at {path}: {_one_line(error)}") from error
        if response.status != 200:
            raise self._fail(f"SGLang failed at {path}: {said[:500]}")

    def _fail(self, message: str) -> UnavailableError:
        self._failure = self._failure or UnavailableError(message)
        return self._failure

    def _require_weights(self) -> None:
        if self._failure is not None:
            raise UnavailableError(self._failure.message)
        if self._label not in self._versions:
            raise UnavailableError("the engine has no weights yet; ask again when the learner has published")


class _SglangMetrics(Collector):
    """Passes on what SGLang's server shows."""

    def __init__(self, url: str) -> None:
        self._url = url

    def collect(self) -> Iterator[Metric]:
        try:
            with urlopen(f"{self._url}/metrics", timeout=5) as page:  # noqa: S310 (the child's own address)
                text = page.read().decode()
        except OSError:
            return iter(())  # it is starting, or gone
        return (metric for metric in text_string_to_metric_families(text) if metric.name.startswith("sglang:"))


def _command_line(
    model_path: Path, options: SglangEngineOptions, signature: ModelSignature, port: int
) -> tuple[list[str], dict[str, str]]:
    on_cpu = not torch.cuda.is_available()
    module = "inference_server.engines.sglang_cpu_shim" if on_cpu else "inference_server.engines.sglang_server"
    context_length = options.context_length or signature.context_length
    arguments = {
        "model-path": model_path,
        "host": _HOST,  # its administration has no other protection
        "port": port,
        "dtype": options.dtype,
        "context-length": context_length,
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
        flags += ["disable-overlap-schedule", "disable-cuda-graph"]
    command = [sys.executable, "-m", module]
    for name, value in arguments.items():
        command += [f"--{name}", str(value)]
    command += [f"--{flag}" for flag in flags] + list(options.arguments)
    environment = dict(os.environ) | {"HF_HUB_OFFLINE": "1"}
    return command, environment | ({"SGLANG_USE_CPU_ENGINE": "1"} if on_cpu else {})


async def _answering(child: _Child, timeout_seconds: float) -> None:
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


async def _end(process: asyncio.subprocess.Process) -> None:
    """End the server with everything that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STOP_SECONDS):
                await process.wait()


async def _events(response: aiohttp.ClientResponse) -> AsyncGenerator[dict[str, Any], None]:
    async for line in response.content:
        if line.startswith(_EVENT) and not line.startswith(_LAST_EVENT):
            yield json.loads(line.removeprefix(_EVENT))


def _columns(token_ids: list[int], said: Mapping[str, Any], start: int, topk: int) -> list[Column]:
    """Columns of the tokens of one event; entries are [log-prob, id, text].

    Raises:
        UnavailableError: the log-probs are of other tokens.
    """
    if not token_ids:
        return []
    end = start + len(token_ids)
    sampled = said["output_token_logprobs"]
    if [entry[1] for entry in sampled] != token_ids:
        raise UnavailableError(f"SGLang sent {len(token_ids)} tokens with the log-probs of others")
    columns = [
        Column(ColumnKind.TOKEN_IDS, start, end, np.array(token_ids, np.int32)),
        Column(ColumnKind.BEHAVIOR_LOGPROBS, start, end, np.array([entry[0] for entry in sampled], np.float32)),
    ]
    if topk:
        listed = said["output_top_logprobs"]
        if len(listed) != len(token_ids) or any(len(entries) != topk for entries in listed):
            raise UnavailableError(f"SGLang listed other candidates than the top-{topk} of {len(token_ids)} tokens")
        ids = np.array([[entry[1] for entry in entries] for entries in listed], np.int32)
        logprobs = np.array([[entry[0] for entry in entries] for entries in listed], np.float32)
        columns.append(Column(ColumnKind.TOPK_TOKEN_IDS, start, end, ids))
        columns.append(Column(ColumnKind.TOPK_LOGPROBS, start, end, logprobs))
    return columns


def _finish_reason(reason: str, reached_max_tokens: bool) -> FinishReason:
    match reason:
        case "stop":
            return FinishReason.STOP
        case "length":
            return FinishReason.LENGTH if reached_max_tokens else FinishReason.CONTEXT
        case _:
            return FinishReason.ABORTED


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
