"""The vLLM engine: vLLM's AsyncLLM in this process, its engine core and workers in processes of their own.

    generate ── slot ──> AsyncLLM ══ ZeroMQ ══> engine core ──> workers
        ▲ chunks; routing and version spans with the last one        ▲
    update_weights ── staged file, pause, `leeway_load_weights`, label, resume
    statistics of each step ──> concurrency limit;  death of the core ──> watch

Log-probs are those of the distribution sampled from (`processed_logprobs`): temperature is in them. Weights are swapped
while vLLM is paused between two steps; each step's output carries the label of the weights that made it, and the spans
are built from those labels.

Keys and values across a swap, `kv_on_update`:

keep       Running sequences keep what the old weights computed. mu is what was sampled from, exactly; a token's routing
           is that of its only forward. A learner that computes the sequence with one set of weights does not find the
           same log-probs after the swap: that difference is what the trust region is for.
recompute  Running sequences are computed again with the new weights before they go on. Tokens after the swap agree with
           a recomputation by the learner. The routing recorded for tokens before the swap stays that of their first
           forward, under the old weights, which is not what the later tokens attended to.

The same happens, in either mode, to a sequence that vLLM preempts for lack of memory. New sequences never read keys of
older weights from the prefix cache: it is salted with the label of the version in force when vLLM is given a request.

The core's death ends open iterators with UnavailableError and `watch` with the same; weights are lost with it, so the
process ends and a new one joins the run like any late server. A swap that fails halfway counts as a death: what is left
may be a mixture, and nothing is sampled from it.
"""
# vLLM is not installed where types are checked.
# pyright: reportMissingImports=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUntypedBaseClass=false, reportUnknownParameterType=false

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import prometheus_client
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from vllm import SamplingParams as VllmSamplingParams
from vllm import __version__ as vllm_version
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMClientError
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
from vllm.v1.metrics.loggers import StatLoggerBase

from inference_server.engine import GenerationEnd, GenerationRequest
from inference_server.engines.concurrency import ConcurrencyLimit, EngineLoad
from inference_server.engines.staged_weights import FILE_NAME, staged_weights
from inference_server.engines.vllm_options import VllmEngineOptions
from inference_server.engines.vllm_outputs import sampled_tokens
from inference_server.requests import check_request
from leeway.errors import ConfigError, DeadlineError, FencedError, InvalidDataError, PreconditionError, UnavailableError
from leeway.huggingface import check_published, model_outline, model_signature
from leeway.types import (
    Array,
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

_T = TypeVar("_T")


class VllmEngine:
    """An Engine over vLLM; made by `start`, used from one event loop."""

    def __init__(
        self,
        llm: AsyncLLM,
        signature: ModelSignature,
        model_path: Path,
        options: VllmEngineOptions,
        limit: ConcurrencyLimit,
    ) -> None:
        self._llm = llm
        self._signature = signature
        self._outline = model_outline(model_path)
        self._options = options
        self._limit = limit
        self._context_length = options.context_length or signature.context_length
        self._routing = llm.vllm_config.aux_output_config.enabled
        self._routing_dtype = np.dtype(np.uint8 if signature.experts <= 256 else np.uint16)
        self._versions: dict[int, PolicyVersion] = {}  # by label; those that open requests may still name
        self._label = 0
        self._highest_epoch = 0
        self._numbers = itertools.count()
        self._open: dict[str, int] = {}  # requests in vLLM, with the label they started under
        self._swapping = asyncio.Lock()
        self._admitting = asyncio.Event()  # not while weights are swapped
        self._admitting.set()
        self._paused = False
        self._failure: UnavailableError | None = None

    @classmethod
    async def start(cls, model_path: Path, options: VllmEngineOptions) -> VllmEngine:
        """Start vLLM's processes and load the model; takes minutes for a large one.

        Raises:
            ConfigError: the directory is no model, or vLLM refuses the model or its arguments.
        """
        signature = model_signature(model_path)
        if options.context_length is not None and options.context_length > signature.context_length:
            raise ConfigError(
                f"context_length {options.context_length} is more than the model's {signature.context_length}; "
                "lower it or leave it unset"
            )
        limit = ConcurrencyLimit(options.max_concurrency, options.max_queued)
        llm = await asyncio.to_thread(_start_vllm, model_path, options, signature, limit)
        llm._run_output_handler()  # it was made in a thread, without an event loop to run in
        engine = cls(llm, signature, model_path, options, limit)
        await engine._command("its start", llm.collective_rpc("leeway_end_with", args=(os.getpid(),)))
        return engine

    def info(self) -> EngineInfo:
        return EngineInfo(
            signature=self._signature,
            engine=f"vllm/{vllm_version}",
            logprob_mode=LogprobMode.SAMPLED,
            version=self._versions.get(self._label),
            max_topk=min(self._options.max_topk, self._signature.vocab_size),
            routing=self._routing,
            max_concurrency=self._limit.limit,
        )

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TrajectoryChunk | GenerationEnd, None]:
        """Sample one completion; what is wrong with the request is raised here, before vLLM sees it.

        Raises:
            InvalidDataError: ids outside the vocabulary, which would kill vLLM; an empty or over-long prompt.
            UnavailableError: from the iterator: vLLM stops or has failed, or has no version yet.
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
        """Stage a file beside the running model, pause, swap, go on; returns the seconds decoding stood still.

        Raises:
            FencedError: a higher publisher epoch has been seen.
            PreconditionError: names or shapes are not the model's, or there is no room to stage; the old weights stay.
            UnavailableError: vLLM failed while it swapped; nothing is sampled any more.
        """
        # Once begun, a swap goes on to its end, whatever becomes of its caller.
        return await asyncio.shield(asyncio.create_task(self._update(snapshot), name="swap weights"))

    async def pause(self) -> None:
        async with self._swapping:
            await self._command("the pause", self._llm.pause_generation(mode="keep", clear_cache=False))
            self._paused = True

    async def resume(self) -> None:
        async with self._swapping:
            self._paused = False
            await self._command("going on", self._llm.resume_generation())

    async def watch(self) -> None:
        """Wait until vLLM has died.

        Raises:
            UnavailableError: it has.
        """
        # No deadline: it is hoped to live as long as this process.
        await asyncio.wait([self._llm.output_handler])
        raise self._fail("vLLM's engine core has died; its log says why")

    def collectors(self) -> list[Collector]:
        """VLLM's own metrics."""
        return [_VllmMetrics()]

    async def aclose(self) -> None:
        self._failure = self._failure or UnavailableError("the engine stops; send the request to another server")
        if not self._llm.errored:
            await self._llm.abort(list(self._open))
        await asyncio.to_thread(self._llm.shutdown)

    # One completion

    async def _stream(self, request: GenerationRequest) -> AsyncGenerator[TrajectoryChunk | GenerationEnd, None]:
        self._require_weights()
        async with self._limit.slot():
            await self._admitting.wait()  # no deadline of its own: each command of a swap has one
            self._require_weights()
            request_id = f"{request.request_id}-{next(self._numbers)}"
            self._open[request_id] = self._label
            try:
                async for item in self._sample(request, request_id):
                    yield item
            except VLLMClientError as error:
                raise InvalidDataError(f"vLLM refuses the request: {_one_line(error)}") from error
            except (EngineDeadError, EngineGenerateError) as error:
                raise self._fail(f"vLLM failed while it sampled: {_one_line(error)}") from error
            finally:
                del self._open[request_id]

    async def _sample(
        self, request: GenerationRequest, request_id: str
    ) -> AsyncGenerator[TrajectoryChunk | GenerationEnd, None]:
        started_at = datetime.now(UTC)
        sampling, num_prompt = request.sampling, len(request.prompt_token_ids)
        room = self._context_length - num_prompt
        prompt = {"prompt_token_ids": request.prompt_token_ids.tolist(), "cache_salt": str(self._label)}
        outputs = self._llm.generate(prompt, self._parameters(request, min(sampling.max_tokens, room)), request_id)
        length = num_prompt
        try:
            async for output in outputs:
                completion = output.outputs[0]
                columns: list[Column] = []
                if completion.token_ids:
                    tokens = sampled_tokens(completion.token_ids, completion.logprobs, sampling.topk)
                    columns = tokens.columns(length)
                    length += len(tokens.token_ids)
                if not output.finished:
                    yield TrajectoryChunk(columns=tuple(columns))
                    continue
                if self._failure is not None:
                    raise UnavailableError(self._failure.message)
                reason = _finish_reason(completion.finish_reason, length - num_prompt == sampling.max_tokens)
                if reason is not FinishReason.ABORTED:
                    spans = self._spans(completion.weight_versions, num_prompt, length)
                    if sampling.routing:
                        columns.append(self._routing_column(completion.routed_experts, length))
                    yield TrajectoryChunk(columns=tuple(columns), version_spans=spans)
                yield GenerationEnd(reason, length - num_prompt, started_at, datetime.now(UTC))
        finally:
            await outputs.aclose()  # aborts what has not finished, which frees its slot and its keys

    def _parameters(self, request: GenerationRequest, max_tokens: int) -> VllmSamplingParams:
        sampling = request.sampling
        return VllmSamplingParams(
            temperature=sampling.temperature,
            max_tokens=max_tokens,
            stop_token_ids=list(sampling.stop_token_ids),
            ignore_eos=True,  # the request says what stops it, not the model's files
            seed=sampling.seed if sampling.seed < 1 << 63 else sampling.seed - (1 << 64),
            logprobs=sampling.topk,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            stream_interval=self._options.chunk_tokens,
            # Unset, vLLM returns the routing of every token, which costs a copy.
            routed_experts_prompt_start=0 if sampling.routing else len(request.prompt_token_ids),
        )

    def _spans(self, labelled: Any, num_prompt: int, length: int) -> tuple[VersionSpan, ...]:  # noqa: ANN401
        spans = tuple(
            VersionSpan(num_prompt + span.start, num_prompt + span.end, self._versions[int(span.version)])
            for span in labelled or ()
            if span.start < span.end
        )
        if not spans or spans[-1].end_token != length:
            raise UnavailableError(f"vLLM labelled no version of token {length - 1}")
        return spans

    def _routing_column(self, rows: Array | None, length: int) -> Column:
        expected = (length - 1, self._signature.moe_layers, self._signature.experts_per_token)
        if rows is None or rows.shape != expected:
            given = "nothing" if rows is None else f"shape {list(rows.shape)}"
            raise PreconditionError(f"vLLM recorded {given} as routing where {list(expected)} was expected")
        return Column(ColumnKind.ROUTING, 0, length - 1, np.ascontiguousarray(rows, self._routing_dtype))

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
                return await self._swap(snapshot.version, folder / FILE_NAME)
            finally:
                self._admitting.set()
                await asyncio.to_thread(staging.__exit__, None, None, None)

    async def _swap(self, version: PolicyVersion, file: Path) -> float:
        stopped_at = time.perf_counter()
        recompute = self._options.kv_on_update == "recompute"
        await self._command("the pause", self._llm.pause_generation(mode="keep", clear_cache=recompute))
        await self._command("the swap", self._llm.collective_rpc("leeway_load_weights", args=(str(file),)))
        label = self._label + 1
        await self._command("the label", self._llm.update_weight_version(str(label)))
        still_named = min(self._open.values(), default=self._label)
        self._versions = {old: named for old, named in self._versions.items() if old >= still_named}
        self._versions[label] = version
        self._label = label
        if not self._paused:
            await self._command("going on", self._llm.resume_generation())
        return time.perf_counter() - stopped_at

    async def _command(self, what: str, command: Awaitable[_T]) -> _T:
        """Await one of vLLM's commands; when it fails, so has the engine."""
        try:
            async with asyncio.timeout(self._options.command_timeout_seconds):
                return await command
        except TimeoutError as error:
            message = f"vLLM did not reach {what} within {self._options.command_timeout_seconds:g} s"
            self._fail(message)
            raise DeadlineError(message) from error
        except Exception as error:
            raise self._fail(f"vLLM failed at {what}: {_one_line(error)}") from error

    def _fail(self, message: str) -> UnavailableError:
        self._failure = self._failure or UnavailableError(message)
        return self._failure

    def _require_weights(self) -> None:
        if self._failure is not None:
            raise UnavailableError(self._failure.message)
        if self._label not in self._versions:
            raise UnavailableError("the engine has no weights yet; ask again when the learner has published")


def _start_vllm(
    model_path: Path, options: VllmEngineOptions, signature: ModelSignature, limit: ConcurrencyLimit
) -> AsyncLLM:
    # vLLM reports its use to its makers and asks the hub about local models unless told otherwise, here and in its
    # children. It takes neither from its arguments.
    os.environ.update({"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"})
    on_cpu = current_platform.is_cpu()
    is_moe = signature.moe_layers > 0
    arguments: dict[str, Any] = {
        "model": str(model_path),
        "dtype": options.dtype,
        "max_model_len": options.context_length or signature.context_length,
        "max_num_seqs": options.max_concurrency,
        "max_logprobs": options.max_topk,
        "logprobs_mode": "processed_logprobs",
        "skip_tokenizer_init": True,
        "enable_prefix_caching": True,
        "enable_return_routed_experts": is_moe and not on_cpu,
        "worker_extension_cls": "inference_server.engines.vllm_worker.WeightLoader",
        "tensor_parallel_size": options.tensor_parallel_size,
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "kv_cache_memory_bytes": options.kv_cache_bytes,
        "disable_log_stats": False,
    }
    if on_cpu and is_moe:
        from inference_server.engines.vllm_cpu_shim import WORKER_CLASS

        arguments["worker_cls"] = WORKER_CLASS
    try:
        config = AsyncEngineArgs(**arguments, **options.arguments).create_engine_config()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"vLLM refuses [inference_server.vllm] for {model_path}: {_one_line(error)}") from error
    if on_cpu and is_moe:
        from inference_server.engines.vllm_cpu_shim import with_routing

        config = with_routing(config)
    try:
        return AsyncLLM.from_vllm_config(config, stat_loggers=[_load_observer(limit.observe)])
    except RuntimeError as error:
        raise ConfigError(f"vLLM did not start with {model_path}: {_one_line(error)}; its log says why") from error


def _load_observer(observe: Callable[[EngineLoad], None]) -> type[StatLoggerBase]:
    """A logger of statistics, as vLLM wants it, that passes on what the concurrency limit needs."""

    class LoadObserver(StatLoggerBase):
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:  # noqa: ANN401
            pass

        def record(
            self,
            scheduler_stats: Any,  # noqa: ANN401
            iteration_stats: Any,  # noqa: ANN401
            mm_cache_stats: Any = None,  # noqa: ANN401
            engine_idx: int = 0,
        ) -> None:
            if scheduler_stats is not None:
                preempted = 0 if iteration_stats is None else int(iteration_stats.num_preempted_reqs)
                running, waiting = scheduler_stats.num_running_reqs, scheduler_stats.num_waiting_reqs
                observe(EngineLoad(running, waiting, scheduler_stats.kv_cache_usage, preempted))

        def log_engine_initialized(self) -> None:
            pass

    return LoadObserver


class _VllmMetrics(Collector):
    """Passes on what vLLM puts into the process-wide registry."""

    def collect(self) -> Iterator[Metric]:
        return (metric for metric in prometheus_client.REGISTRY.collect() if metric.name.startswith("vllm:"))


def _finish_reason(reason: str | None, reached_max_tokens: bool) -> FinishReason:
    match reason:
        case "stop":
            return FinishReason.STOP
        case "length":
            return FinishReason.LENGTH if reached_max_tokens else FinishReason.CONTEXT
        case _:
            return FinishReason.ABORTED


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
