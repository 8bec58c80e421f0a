"""The vLLM engine: vLLM's AsyncLLM in this process, its engine core and workers in processes of their own.

    sample ──> AsyncLLM ══ ZeroMQ ══> engine core ──> workers
    chunks; routing and labels with the last one  ◄──┘    ▲ `leeway_load_weights`, then the label
    statistics of each step ──> concurrency limit;  death of the core ──> ended

Admission, pause and swap are in `engines.process`. Log-probs are those of the distribution sampled from
(`processed_logprobs`): temperature is in them. Each step's output carries the label of the weights that made it.

Keys and values across a swap, `kv_on_update`:

keep       Running sequences keep what the old weights computed. mu is what was sampled from, exactly; a token's routing
           is that of its only forward. A learner that computes the sequence with one set of weights does not find the
           same log-probs after the swap: that difference is what the trust region is for.
recompute  Running sequences are computed again with the new weights before they go on. Tokens after the swap agree with
           a recomputation by the learner. The routing recorded for tokens before the swap stays that of their first
           forward, under the old weights, which is not what the later tokens attended to.

The same happens, in either mode, to a sequence that vLLM preempts for lack of memory. New sequences never read keys of
older weights from the prefix cache: it is salted with the label of the version in force when vLLM is given a request.
"""
# vLLM is not installed where types are checked.
# pyright: reportMissingImports=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUntypedBaseClass=false, reportUnknownParameterType=false

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import prometheus_client
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from vllm import SamplingParams as VllmSamplingParams  # pyright: ignore[reportAttributeAccessIssue] (the folder here)
from vllm import __version__ as vllm_version  # pyright: ignore[reportAttributeAccessIssue]
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMClientError
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
from vllm.v1.metrics.loggers import StatLoggerBase

from inference_server.engine import GenerationRequest, check_context_length
from inference_server.engines.process.concurrency import ConcurrencyLimit, EngineLoad
from inference_server.engines.process.driver import (
    Labelled,
    SampledEnd,
    finish_reason,
    manifest_check,
    one_line,
)
from inference_server.engines.process.engine import ProcessEngine
from inference_server.engines.process.staged_weights import FILE_NAME, remove_abandoned
from inference_server.engines.vllm.outputs import sampled_tokens, signed_seed
from leeway.config import VllmEngineOptions
from leeway.errors import ConfigError, DeadlineError, InvalidDataError, PreconditionError
from leeway.huggingface import model_signature
from leeway.types import (
    Array,
    Column,
    ColumnKind,
    EngineInfo,
    FinishReason,
    LogprobMode,
    ModelSignature,
    TrajectoryChunk,
)


async def start(model_path: Path, options: VllmEngineOptions) -> ProcessEngine:
    """Start vLLM's processes and load the model; takes minutes for a large one.

    Raises:
        ConfigError: the directory is no model, or vLLM refuses the model or its arguments.
        DeadlineError: its workers did not answer.
    """
    signature = model_signature(model_path)
    check_context_length(options, signature)
    limit = ConcurrencyLimit(options.max_concurrency, options.max_queued)
    await asyncio.to_thread(remove_abandoned, options.staging_directory)
    llm = await asyncio.to_thread(_start_vllm, model_path, options, signature, limit)
    llm._run_output_handler()  # it was made in a thread, without an event loop to run in
    try:
        async with asyncio.timeout(options.command_timeout_seconds):
            await llm.collective_rpc("leeway_end_with", args=(os.getpid(),))
    except TimeoutError as error:
        raise DeadlineError(
            f"vLLM's workers did not answer within {options.command_timeout_seconds:g} s of their start"
        ) from error
    info = EngineInfo(
        signature=signature,
        engine=f"vllm/{vllm_version}",
        logprob_mode=LogprobMode.SAMPLED,
        version=None,
        max_topk=min(options.max_topk, signature.vocab_size),
        routing=llm.vllm_config.aux_output_config.enabled,
        max_concurrency=options.max_concurrency,
    )
    return ProcessEngine(VllmDriver(llm, signature, options, limit), info, options, limit, manifest_check(model_path))


class VllmDriver:
    """AsyncLLM as `EngineDriver` describes it."""

    name = "vLLM"
    failures = (EngineDeadError, EngineGenerateError)

    def __init__(
        self, llm: AsyncLLM, signature: ModelSignature, options: VllmEngineOptions, limit: ConcurrencyLimit
    ) -> None:
        self._llm = llm
        self._signature = signature
        self._options = options
        self._limit = limit
        self._routing_dtype = np.dtype(np.uint8 if signature.experts <= 256 else np.uint16)

    async def sample(
        self, request: GenerationRequest, request_id: str, label: int, max_tokens: int
    ) -> AsyncGenerator[TrajectoryChunk | SampledEnd, None]:
        sampling, num_prompt = request.sampling, len(request.prompt_token_ids)
        prompt = {"prompt_token_ids": request.prompt_token_ids.tolist(), "cache_salt": str(label)}
        outputs = self._llm.generate(prompt, self._parameters(request, max_tokens), request_id)
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
                num_tokens = length - num_prompt
                reason = finish_reason(completion.finish_reason, num_tokens == sampling.max_tokens)
                if reason is not FinishReason.ABORTED and sampling.routing:
                    columns.append(self._routing_column(completion.routed_experts, length))
                labels = [
                    Labelled(span.start, span.end, int(span.version)) for span in completion.weight_versions or ()
                ]
                yield SampledEnd(reason, num_tokens, tuple(columns), labels)
        except VLLMClientError as error:
            raise InvalidDataError(f"vLLM refuses the request: {one_line(error)}") from error
        finally:
            await outputs.aclose()  # aborts what has not finished, which frees its slot and its keys

    async def pause(self, *, recompute: bool) -> None:
        if recompute:
            self._limit.forgive()
        await self._llm.pause_generation(mode="keep", clear_cache=recompute)

    async def load(self, folder: Path, label: int) -> None:
        await self._llm.collective_rpc("leeway_load_weights", args=(str(folder / FILE_NAME),))
        await self._llm.update_weight_version(str(label))

    async def resume(self) -> None:
        await self._llm.resume_generation()

    async def ended(self) -> str:
        await asyncio.wait([self._llm.output_handler])
        return "its engine core is gone"

    def kill(self) -> None:
        manager = self._llm.engine_core.resources.engine_manager
        for process in manager.processes if manager is not None else ():
            process.kill()

    async def aclose(self, request_ids: Sequence[str]) -> None:
        if not self._llm.errored:
            await self._llm.abort(list(request_ids))
        await asyncio.to_thread(self._llm.shutdown)

    def collectors(self) -> list[Collector]:
        return [_VllmMetrics()]

    def _parameters(self, request: GenerationRequest, max_tokens: int) -> VllmSamplingParams:
        sampling = request.sampling
        return VllmSamplingParams(
            temperature=sampling.temperature,
            max_tokens=max_tokens,
            stop_token_ids=list(sampling.stop_token_ids),
            ignore_eos=True,  # the request says what stops it, not the model's files
            seed=signed_seed(sampling.seed),
            logprobs=sampling.topk,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            stream_interval=self._options.chunk_tokens,
            # Unset, vLLM returns the routing of every token, which costs a copy.
            routed_experts_prompt_start=0 if sampling.routing else len(request.prompt_token_ids),
        )

    def _routing_column(self, rows: Array | None, length: int) -> Column:
        expected = (length - 1, self._signature.moe_layers, self._signature.experts_per_token)
        if rows is None or rows.shape != expected:
            given = "nothing" if rows is None else f"shape {list(rows.shape)}"
            raise PreconditionError(f"vLLM recorded {given} as routing where {list(expected)} was expected")
        return Column(ColumnKind.ROUTING, 0, length - 1, np.ascontiguousarray(rows, self._routing_dtype))


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
        "worker_extension_cls": "inference_server.engines.vllm.worker.WeightLoader",
        "tensor_parallel_size": options.tensor_parallel_size,
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "kv_cache_memory_bytes": options.kv_cache_bytes,
        "disable_log_stats": False,
    }
    if on_cpu and is_moe:
        from inference_server.engines.vllm.cpu_shim import WORKER_CLASS

        arguments["worker_cls"] = WORKER_CLASS
    try:
        config = AsyncEngineArgs(**arguments, **options.arguments).create_engine_config()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"vLLM refuses [inference_server.vllm] for {model_path}: {one_line(error)}") from error
    if on_cpu and is_moe:
        from inference_server.engines.vllm.cpu_shim import with_routing

        config = with_routing(config)
    try:
        return AsyncLLM.from_vllm_config(config, stat_loggers=[_load_observer(limit.observe)])
    except RuntimeError as error:
        raise ConfigError(f"vLLM did not start with {model_path}: {one_line(error)}; its log says why") from error


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
