"""The SGLang engine: SGLang's own server as a child process, spoken to over HTTP on the loopback.

    sample ──> POST /generate ══ events of a stream ══> chunks; routing and labels with the last one
    load ──> /update_weights_from_disk with a label
    retractions that a completion reports ──> concurrency limit;  end of the child ──> ended

Admission, pause and swap are in `engines.process`. Log-probs include the temperature, and requests have no other
transform, so they are those of the distribution sampled from. An id outside the vocabulary would end SGLang, and it
ignores what it does not know: requests are checked before they come here.

Keys and values across a swap, `kv_on_update`, are as in the vLLM engine: `keep` pauses in place, so sequences go
on with the keys of the old weights, mu is exact and a token's routing is that of its only forward; `recompute` retracts
them, and they are computed again with the new weights, as is their routing: SGLang does not keep what it recorded for
the tokens before the swap. The prefix cache is salted with the label of the version.

A request that names stop tokens is also stopped by the end-of-sequence tokens that the model's files name: SGLang has
no way to say otherwise.
"""
# aiohttp comes with SGLang, which is not installed where types are checked.
# pyright: reportMissingImports=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import shutil
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final
from urllib.request import urlopen

import aiohttp
import numpy as np
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from inference_server.engine import GenerationRequest, check_context_length
from inference_server.engines.process.concurrency import ConcurrencyLimit, EngineLoad
from inference_server.engines.process.driver import (
    Labelled,
    SampledEnd,
    finish_reason,
    manifest_check,
)
from inference_server.engines.process.engine import ProcessEngine
from inference_server.engines.process.staged_weights import remove_abandoned
from inference_server.engines.sglang.process import SglangProcess, start_process
from leeway.config import SglangEngineOptions
from leeway.errors import InvalidDataError, PreconditionError, UnavailableError
from leeway.huggingface import model_signature
from leeway.types import (
    Column,
    ColumnKind,
    EngineInfo,
    FinishReason,
    LogprobMode,
    ModelSignature,
    SamplingParams,
    TrajectoryChunk,
)

_EVENT: Final = b"data: "
_LAST_EVENT: Final = b"data: [DONE]"
_MAX_LINE_BYTES: Final = 1 << 28  # the last event carries a sequence's routing


async def start(model_path: Path, options: SglangEngineOptions) -> ProcessEngine:
    """Start SGLang's server and wait until it answers; takes minutes for a large model.

    Raises:
        ConfigError: the directory is no model, or SGLang refuses the model or its arguments.
        DeadlineError: it did not answer in time.
    """
    signature = model_signature(model_path)
    check_context_length(options, signature)
    await asyncio.to_thread(remove_abandoned, options.staging_directory)
    child = await start_process(model_path, options, signature)
    try:
        check = manifest_check(model_path)
    except BaseException:
        await child.end()
        raise
    limit = ConcurrencyLimit(options.max_concurrency, options.max_queued)
    info = EngineInfo(
        signature=signature,
        engine=f"sglang/{version('sglang')}",
        logprob_mode=LogprobMode.SAMPLED,
        version=None,
        max_topk=min(options.max_topk, signature.vocab_size),
        routing=signature.moe_layers > 0,
        max_concurrency=options.max_concurrency,
    )
    return ProcessEngine(SglangDriver(child, signature, model_path, options, limit), info, options, limit, check)


class SglangDriver:
    """SGLang's server as `EngineDriver` describes it."""

    name = "SGLang"
    failures: tuple[type[Exception], ...] = (aiohttp.ClientError, ConnectionError, ValueError)

    def __init__(
        self,
        child: SglangProcess,
        signature: ModelSignature,
        model_path: Path,
        options: SglangEngineOptions,
        limit: ConcurrencyLimit,
    ) -> None:
        self._child = child
        self._signature = signature
        self._model_path = model_path
        self._recompute = options.kv_on_update == "recompute"
        self._limit = limit
        self._num_open = 0
        self._routing_dtype = np.dtype(np.uint8 if signature.experts <= 256 else np.uint16)
        # No deadline over a whole generation, which is its caller's to bound.
        self._session = aiohttp.ClientSession(
            child.url, timeout=aiohttp.ClientTimeout(total=None), read_bufsize=_MAX_LINE_BYTES
        )

    async def sample(
        self, request: GenerationRequest, request_id: str, label: int, max_tokens: int
    ) -> AsyncGenerator[TrajectoryChunk | SampledEnd, None]:
        sampling, num_prompt = request.sampling, len(request.prompt_token_ids)
        length = num_prompt
        finish = None
        self._num_open += 1
        try:
            body = _body(request, request_id, label, max_tokens)
            async with self._session.post("/generate", json=body) as response:
                if response.status != 200:
                    raise InvalidDataError(f"SGLang refuses the request: {(await response.text())[:500]}")
                async for event in _events(response):
                    if "error" in event:
                        raise UnavailableError(f"SGLang failed while it sampled: {event['error']}")
                    said: Mapping[str, Any] = event["meta_info"]
                    columns = _columns(event["output_ids"], said, length, sampling.topk)
                    length += len(event["output_ids"])
                    finish = said.get("finish_reason")
                    if finish is not None:
                        yield self._end(finish["type"], columns, said, sampling, num_prompt, length)
                        return
                    if columns:
                        yield TrajectoryChunk(columns=tuple(columns))
            raise UnavailableError("SGLang ended a stream without saying why")
        finally:
            self._num_open -= 1
            if finish is None and not self._session.closed:
                await self._abort(request_id)

    def _end(
        self,
        finish: str,
        columns: list[Column],
        said: Mapping[str, Any],
        sampling: SamplingParams,
        num_prompt: int,
        length: int,
    ) -> SampledEnd:
        num_tokens = length - num_prompt
        reason = finish_reason(finish, num_tokens == sampling.max_tokens)
        if reason is not FinishReason.ABORTED and sampling.routing:
            columns.append(self._routing_column(said.get("routed_experts"), length))
        spans = said.get("weight_versions") or ()
        labels = [Labelled(span["start"], span["end"], int(span["version"])) for span in spans]
        retracted = int(said.get("num_retractions", 0))
        if self._recompute:
            retracted = max(0, retracted - max(0, len(labels) - 1))  # each swap retracts what runs
        self._limit.observe(EngineLoad(self._num_open, 0, 0.0, retracted))
        return SampledEnd(reason, num_tokens, tuple(columns), labels)

    async def _abort(self, request_id: str) -> None:
        with contextlib.suppress(aiohttp.ClientError, ConnectionError):  # then it has ended with SGLang
            async with self._session.post("/abort_request", json={"rid": request_id}):
                pass

    def _routing_column(self, encoded: str | None, length: int) -> Column:
        shape = (length - 1, self._signature.moe_layers, self._signature.experts_per_token)
        rows = np.frombuffer(base64.b64decode(encoded or ""), "<i4")
        if rows.size != np.prod(shape):
            raise PreconditionError(f"SGLang recorded {rows.size} numbers as routing where {list(shape)} was expected")
        return Column(ColumnKind.ROUTING, 0, length - 1, rows.reshape(shape).astype(self._routing_dtype))

    async def pause(self, *, recompute: bool) -> None:
        await self._command("/pause_generation", {"mode": "retract" if recompute else "in_place"})

    async def load(self, folder: Path, label: int) -> None:
        shutil.copyfile(self._model_path / "config.json", folder / "config.json")
        await self._command(
            "/update_weights_from_disk",
            {"model_path": str(folder), "weight_version": str(label), "flush_cache": self._recompute},
        )

    async def resume(self) -> None:
        await self._command("/continue_generation", {})

    async def _command(self, path: str, body: Mapping[str, Any]) -> None:
        async with self._session.post(path, json=body) as response:
            said = await response.text()
        if response.status != 200:
            raise UnavailableError(f"{path} was answered with {said[:500]}")

    async def ended(self) -> str:
        return f"it ended with code {await self._child.child.wait()}"

    def kill(self) -> None:
        self._child.child.kill()

    async def aclose(self, request_ids: Sequence[str]) -> None:
        await self._child.end()  # which ends every stream
        await self._session.close()

    def collectors(self) -> list[Collector]:
        return [_SglangMetrics(self._child.url)]


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


def _body(request: GenerationRequest, request_id: str, label: int, max_tokens: int) -> dict[str, Any]:
    sampling = request.sampling
    return {
        "rid": request_id,
        "input_ids": request.prompt_token_ids.tolist(),
        "sampling_params": {
            "temperature": sampling.temperature,
            "max_new_tokens": max_tokens,
            "stop_token_ids": list(sampling.stop_token_ids),
            "ignore_eos": not sampling.stop_token_ids,  # with it, SGLang ignores the request's own stop tokens too
            "no_stop_trim": True,
            "sampling_seed": sampling.seed - (sampling.seed >> 63 << 64),  # signed
        },
        "stream": True,
        "return_logprob": True,
        "logprob_start_len": -1,
        "top_logprobs_num": sampling.topk,
        "return_routed_experts": sampling.routing,
        "cache_salt": str(label),
    }


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
