"""The transformers engine: a Hugging Face causal language model, batched continuously, its weights replaced in flight.

Requests are checked here, in the caller's thread; `decode_thread` samples them. The log-probs are those of the
distribution sampled from: softmax of logits / temperature in float32. Published weights are copied, as rounded by the
publisher, into parameters of the compute type; running sequences keep their keys and values across a swap, and mu is
by definition what each token was sampled from.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from concurrent.futures import Future
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import torch

from inference_server.engine import GenerationEnd, GenerationRequest, check_context_length, check_request
from inference_server.engines.transformers.decode_batch import DecodeBatch
from inference_server.engines.transformers.decode_sequence import DecodeSequence, RoutingShape
from inference_server.engines.transformers.decode_thread import DecodeThread, StagedUpdate
from inference_server.engines.transformers.routing_capture import RoutingCapture
from leeway.config import TransformersEngineOptions
from leeway.errors import ConfigError, DeadlineError, InvalidDataError, PreconditionError, UnavailableError
from leeway.huggingface import (
    check_published,
    load_model,
    load_published,
    model_signature,
    tensor_from_bytes,
    torch_dtype,
)
from leeway.types import EngineInfo, LogprobMode, TrajectoryChunk, WeightSnapshot

# Rotary embeddings whose angles depend on the longest sequence in the batch: a token's logits would depend on its
# batch-mates.
_BATCH_DEPENDENT_ROPE: Final = ("dynamic", "longrope")

_ResultT = TypeVar("_ResultT")


async def start(model_path: Path, options: TransformersEngineOptions) -> TransformersEngine:
    """Load the model in a thread; see TransformersEngine."""
    return await asyncio.to_thread(TransformersEngine, model_path, options)


class TransformersEngine:
    """An Engine over `transformers`. Construct it in any thread; use it from one event loop.

    Args:
        model_path: a model directory. Its weights are replaced by the first update, before which nothing is sampled.
        options: how to decode.

    Raises:
        ConfigError: the directory is no model, or one whose layers this engine does not batch.
    """

    def __init__(self, model_path: Path, options: TransformersEngineOptions) -> None:
        self._options = options
        self._name = f"transformers/{version('transformers')}"  # read once: it is looked up on disk
        self._signature = model_signature(model_path)
        self._model = load_model(model_path, torch_dtype(options.dtype))
        self._model.requires_grad_(requires_grad=False)
        _require_full_attention(self._model.config, model_path)
        check_context_length(options, self._signature)
        self._context_length = options.context_length or self._signature.context_length
        self._capture = RoutingCapture(self._model)
        if self._signature.moe_layers:
            cast("Any", self._model).set_experts_implementation(options.experts_implementation)
        batch = DecodeBatch(
            self._model,
            int(cast("Any", self._model.config).num_hidden_layers),
            self._capture,
            options.max_concurrency,
            self._context_length,
            options.prefill_tokens,
        )
        self._thread = DecodeThread(batch, options.chunk_tokens, options.max_queued, options.num_threads)

    def info(self) -> EngineInfo:
        return EngineInfo(
            signature=self._signature,
            engine=self._name,
            logprob_mode=LogprobMode.SAMPLED,
            version=self._thread.version,
            max_topk=min(self._options.max_topk, self._signature.vocab_size),
            routing=self._capture.num_layers > 0,
            max_concurrency=self._options.max_concurrency,
        )

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TrajectoryChunk | GenerationEnd, None]:
        """Sample one completion. An invalid request is refused here, before anything is queued.

        Raises:
            InvalidDataError: ids outside the vocabulary, an empty or over-long prompt, a recording that the model
                cannot give.
            UnavailableError: from the iterator: the engine stops or has failed, or has no version yet.
            ExhaustedError: from the iterator: too many requests wait.
        """
        check_request(request, self.info(), self._context_length)
        return self._stream(request)

    async def update_weights(self, snapshot: WeightSnapshot) -> float:
        """Stage verified weights beside the running ones, swap between two steps; returns the seconds of the pause.

        Raises:
            FencedError: a higher publisher epoch has been seen.
            PreconditionError: names, shapes or types are not the model's; the old weights stay.
            DeadlineError: the decode loop did not reach the end of a step in time; the swap may still happen.
        """
        self._thread.check_epoch(snapshot.publisher_epoch)
        if snapshot.version == self._thread.version:
            return 0.0
        tensors = await asyncio.to_thread(self._stage, snapshot)
        update = StagedUpdate(snapshot.version, snapshot.publisher_epoch, lambda: load_published(self._model, tensors))
        self._thread.swap(update)
        return await self._reached(update.done, f"the swap to {snapshot.version}")

    async def pause(self) -> None:
        await self._reached(self._thread.pause(), "the pause")

    async def resume(self) -> None:
        self._thread.resume()

    async def aclose(self) -> None:
        if not await asyncio.to_thread(self._thread.stop, self._options.command_timeout_seconds):
            raise DeadlineError(
                f"the decode loop did not stop within {self._options.command_timeout_seconds} s; end the process"
            )

    async def _stream(self, request: GenerationRequest) -> AsyncGenerator[TrajectoryChunk | GenerationEnd, None]:
        items: asyncio.Queue[TrajectoryChunk | GenerationEnd | Exception] = asyncio.Queue()
        routing = self._routing_shape() if request.sampling.routing else None
        sequence = DecodeSequence(request, self._context_length, routing, items.put_nowait)
        self._thread.submit(sequence, asyncio.get_running_loop())
        try:
            while True:
                # No deadline: how long a sequence takes is its caller's to bound, and whatever ends the loop arrives
                # here.
                item = await items.get()
                if isinstance(item, Exception):
                    raise UnavailableError(str(item)) from item
                yield item
                if isinstance(item, GenerationEnd):
                    return
        finally:
            self._thread.cancel(sequence)

    def _stage(self, snapshot: WeightSnapshot) -> Mapping[str, torch.Tensor]:
        entries = snapshot.manifest.tensors
        check_published(self._model, {entry.name: entry.shape for entry in entries})
        try:
            return {
                entry.name: tensor_from_bytes(entry.dtype, entry.shape, buffer)
                for entry, buffer in zip(entries, snapshot.buffers, strict=True)
            }
        except (InvalidDataError, ValueError) as error:
            raise PreconditionError(f"the weights of {snapshot.version} cannot be staged: {error}") from error

    async def _reached(self, future: Future[_ResultT], what: str) -> _ResultT:
        try:
            async with asyncio.timeout(self._options.command_timeout_seconds):
                return await asyncio.shield(asyncio.wrap_future(future))
        except TimeoutError as error:
            raise DeadlineError(
                f"the decode loop did not reach {what} within {self._options.command_timeout_seconds} s"
            ) from error

    def _routing_shape(self) -> RoutingShape:
        return RoutingShape(self._capture.num_layers, self._capture.experts_per_token, self._capture.dtype)


def _require_full_attention(config: object, path: Path) -> None:
    """Refuse models that one cache with rows of different lengths cannot serve."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(config, "sliding_window", None):
        raise ConfigError(
            f"{path}: the transformers engine batches full attention only, not {', '.join(sorted(kinds))}"
        )
    rope = dict(getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in _BATCH_DEPENDENT_ROPE:
        raise ConfigError(f"{path}: {rope} rotary embeddings make a token depend on its batch; use a fixed scaling")
