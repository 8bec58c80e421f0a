"""Where routing comes from: the shipped model's engine, and draws in the shapes of large models."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from examples.sortmix8.task import tasks
from inference_server.engine import GenerationEnd, GenerationRequest
from inference_server.engines.transformers.engine import TransformersEngine
from inference_server.rollout.text import HuggingFaceTokenizer
from learner.training.torch_trainer import TorchTrainer
from leeway.config import SamplingOptions, TrainingOptions, TransformersEngineOptions
from leeway.types import Array, ColumnKind, PolicyVersion, WeightSnapshot
from leeway.weights.digests import weights_digest

MODEL = Path(__file__).parents[2] / "examples" / "sortmix8" / "model-moe"


@dataclass(frozen=True, slots=True)
class Source:
    """Routing as columns [n, L, k] that are packed one by one."""

    name: str
    experts: int
    columns: tuple[Array, ...]
    engine_tokens_per_second: float | None = None  # CPU time of one core

    @property
    def pooled(self) -> Array:
        """All rows."""
        return np.concatenate(self.columns)


def sortmix8(trajectories: int) -> Source:
    """Completions of the shipped mixture of experts, as its engine samples them."""
    return asyncio.run(_sortmix8(trajectories))


async def _sortmix8(trajectories: int) -> Source:
    sampling = SamplingOptions(max_tokens=9, routing=True)
    trainer = TorchTrainer.from_directory(MODEL, TrainingOptions(algorithm="dppo-binary-tv"))
    manifest, buffers = trainer.published()
    version = PolicyVersion("benchmark", 1, 0, weights_digest(manifest))
    engine = TransformersEngine(MODEL, TransformersEngineOptions())
    await engine.update_weights(WeightSnapshot(version, 1, manifest, buffers))
    tokenizer = HuggingFaceTokenizer(MODEL, chat=False)

    async def sample(index: int, prompt: str) -> Array:
        prompt_ids = np.array(tokenizer.encode(prompt), dtype=np.int32)
        params = sampling.params(trainer.stop_token_ids)
        rows: list[Array] = []
        async for event in engine.generate(GenerationRequest(f"{index}", prompt_ids, params)):
            if not isinstance(event, GenerationEnd):
                rows += [column.values for column in event.columns if column.kind is ColumnKind.ROUTING]
        return np.concatenate(rows)

    drawn = tasks("train", trajectories, 0)
    began = time.process_time()
    columns = await asyncio.gather(*(sample(index, task["prompt"]) for index, task in enumerate(drawn)))
    seconds = time.process_time() - began
    await engine.aclose()
    rate = sum(map(len, columns)) / seconds
    return Source(f"sortmix8, {len(columns[0])} rows each", engine.info().signature.experts, tuple(columns), rate)


def joined(source: Source, rows: int) -> Source:
    """The same rows in columns of so many: what longer completions would send."""
    pooled = source.pooled
    whole = len(pooled) // rows * rows
    columns = tuple(np.split(pooled[:whole], whole // rows))
    name = f"{source.name.split(',')[0]}, {rows} rows together"
    return Source(name, source.experts, columns, source.engine_tokens_per_second)


def drawn(layers: int, experts: int, k: int, rows: int, skew: float = 1.0) -> Source:
    """Tokens that choose independently, by popularities exp(skew * N(0, 1)) of each layer's experts."""
    random = np.random.default_rng(0)
    ids = np.empty((rows, layers, k), np.uint8 if experts <= 256 else np.uint16)
    for layer in range(layers):
        keys = skew * random.standard_normal(experts) + random.gumbel(size=(rows, experts))
        likeliest = np.argpartition(-keys, k, axis=1)[:, :k]
        order = np.argsort(-np.take_along_axis(keys, likeliest, 1), axis=1)
        ids[:, layer] = np.take_along_axis(likeliest, order, 1)
    return Source(f"drawn {layers}x{experts} top-{k}, skew {skew:g}, {rows} rows", experts, (ids,))
