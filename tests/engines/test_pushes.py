"""A server with a real engine never serves a mixture, and every label is right, though pushes go wrong.

    learner ── spoilt, lost, late ──> server: receiver, engine     killed once, with weights staged beside the engine
    sequences run all the time ──> each token has the log-prob that transformers finds with the weights its label names

vLLM and SGLang compute running sequences again when weights change, so this holds across a swap, too; transformers
keeps keys and values, so there it is asked of a sequence's tokens up to the first swap.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import random
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from transformers import PreTrainedModel

from leeway.errors import LeewayError
from leeway.huggingface import model_signature
from leeway.types import ColumnKind, PolicyVersion, SamplingParams, VersionSpan, WeightSnapshot
from tests.engines.conftest import ENGINES, VOCAB_SIZE, make_model
from tests.engines.engine_server import (
    RUN,
    EngineServer,
    EnvironmentMissingError,
    configuration,
    interpreter,
    started_server,
)
from tests.engines.sampled import Completion, reference, sample
from tests.push.faults import Faults, FaultyPublisher
from tests.unit import tiny_models

EXACT = 1e-4
PUSHES = 10
KILLED_AT = 4
SEED = 11


class History:
    """A model that is trained a little in each step, and everywhere in every third."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._generator = torch.Generator().manual_seed(SEED)
        self._model = model
        self._step = 0
        self.models: dict[PolicyVersion, PreTrainedModel] = {}

    def publish(self) -> WeightSnapshot:
        snapshot = tiny_models.snapshot(self._model, self._step, epoch=1)
        self.models[snapshot.version] = self._model
        return snapshot

    def train(self) -> None:
        self._step += 1
        self._model = copy.deepcopy(self._model)
        share = 1.0 if self._step % 3 == 0 else 0.03
        with torch.no_grad():
            for parameter in self._model.parameters():
                moved = torch.rand(parameter.shape, generator=self._generator) < share
                parameter += moved * 0.05 * torch.randn(parameter.shape, generator=self._generator)


class Account:
    """Everything that was sampled, held against transformers."""

    def __init__(self, history: History, *, recomputed: bool) -> None:
        self._history = history
        self._recomputed = recomputed
        self.num_tokens = 0
        self.num_swapped = 0
        self.versions: set[PolicyVersion] = set()

    def check(self, completion: Completion) -> None:
        spans = _merged(completion.spans)
        self.num_swapped += len(spans) > 1
        for span in spans if self._recomputed else spans[:1]:
            assert span.version in self._history.models, f"{span.version} was never published"
            expected = reference(self._history.models[span.version], completion)
            labelled = slice(span.start_token - len(completion.prompt), span.end_token - len(completion.prompt))
            logprobs = completion.column(ColumnKind.BEHAVIOR_LOGPROBS)
            assert np.abs(logprobs - expected.logprobs)[labelled].max() < EXACT, span
            candidates = completion.column(ColumnKind.TOPK_LOGPROBS)
            assert np.abs(candidates - expected.candidates)[labelled].max() < EXACT, span
            listed = completion.column(ColumnKind.TOPK_TOKEN_IDS)
            np.testing.assert_array_equal(listed[labelled, 0], expected.topk_token_ids[labelled, 0])
            self.versions.add(span.version)
            self.num_tokens += span.end_token - span.start_token

    def assert_told_apart(self, completion: Completion) -> None:
        """No other version computes what this one does: a wrong label would have been seen."""
        logprobs = completion.column(ColumnKind.BEHAVIOR_LOGPROBS)
        for version, model in self._history.models.items():
            if version != completion.spans[0].version:
                assert np.abs(logprobs - reference(model, completion).logprobs).max() > 10 * EXACT


def _merged(spans: Sequence[VersionSpan]) -> list[VersionSpan]:
    """As few spans as say the same."""
    merged: list[VersionSpan] = []
    for span in spans:
        if merged and merged[-1].version == span.version:
            span = replace(merged.pop(), end_token=span.end_token)
        merged.append(span)
    return merged


@pytest.mark.timeout(900)  # two starts of the engine
@pytest.mark.parametrize("engine", ENGINES)
async def test_no_server_ever_serves_a_mixture_and_every_label_is_right(engine: str, tmp_path: Path) -> None:
    try:
        python = interpreter(engine)
    except EnvironmentMissingError as missing:
        pytest.skip(str(missing))
    model = make_model(0, moe=False)
    path = tiny_models.save(model, tmp_path / "model")
    staging = tmp_path / "staging"
    staging.mkdir()
    recomputed = engine != "transformers"
    options: dict[str, Any] = {"chunk_tokens": 4}
    if recomputed:
        options |= {"kv_on_update": "recompute", "staging_directory": str(staging)}
    settings = configuration(engine, path, tmp_path, **options)
    history, faults = History(model), Faults(SEED, 0.04)
    account = Account(history, recomputed=recomputed)
    publisher = FaultyPublisher(faults, RUN, model_signature(path))
    learner = await publisher.start(settings["network"]["policy"])
    await publisher.publish(history.publish())
    try:
        with started_server(engine, python, settings, tmp_path) as server:
            async with _sequences(server, account, 1):
                for _ in range(KILLED_AT):
                    await _push(publisher, history, server, account)
                history.train()
                await publisher.publish(history.publish())
                if recomputed:
                    await _until_staged(staging)
                await _kill(server)
        with started_server(engine, python, settings, tmp_path) as server:
            async with _sequences(server, account, 2):
                for _ in range(PUSHES - KILLED_AT - 1):
                    await _push(publisher, history, server, account)
                faults.probability = 0.0
                history.train()
                last = history.publish()
                await publisher.publish(last)
                await _until(server, lambda version: version == last.version, 60.0)
            account.assert_told_apart(await _served(server, account))
    finally:
        await learner.stop(0.0)
        await publisher.aclose()
    assert list(staging.iterdir()) == []
    assert sum(faults.counts.values()) >= 3, faults.counts
    assert account.num_tokens > 200
    assert account.num_swapped
    assert len(account.versions) > PUSHES // 2
    sent = {
        sample.labels["kind"]
        for family in publisher.metrics.published_bytes.collect()
        for sample in family.samples
        if sample.name.endswith("_total") and sample.value
    }
    assert {"delta", "snapshot"} <= sent


async def _push(publisher: FaultyPublisher, history: History, server: EngineServer, account: Account) -> None:
    """Publish a step, give it a moment to arrive, and look at what is served then, if anything is."""
    history.train()
    snapshot = history.publish()
    await publisher.publish(snapshot)
    with contextlib.suppress(TimeoutError):
        await _until(server, lambda version: version == snapshot.version, 3.0)
    if (await server.info()).version is not None:
        await _served(server, account)


async def _served(server: EngineServer, account: Account) -> Completion:
    """A completion of the server, checked."""
    async with server.connect() as engine:
        completion = await sample(engine, np.arange(2, 40, dtype=np.int32), SamplingParams(0.8, 24, (), 5, 20))
    account.check(completion)
    return completion


@contextlib.asynccontextmanager
async def _sequences(server: EngineServer, account: Account, seed: int) -> AsyncGenerator[None, None]:
    """Sequences run throughout the block, for swaps to come upon, or until the server is gone; each is checked."""
    generator = random.Random(seed)
    ending = asyncio.Event()
    num_tokens = {"transformers": 150, "vllm": 400, "sglang": 40}[server.engine]

    async def run() -> None:
        async with server.connect() as engine:
            while not ending.is_set():
                prompt = np.array([generator.randrange(2, VOCAB_SIZE) for _ in range(16)], np.int32)
                try:
                    sampling = SamplingParams(1.0, num_tokens, (), generator.randrange(99), 20)
                    account.check(await sample(engine, prompt, sampling))
                except LeewayError:
                    if server.process.poll() is not None:
                        return
                    await asyncio.sleep(0.1)  # it has no weights yet

    async with asyncio.TaskGroup() as group:
        group.create_task(run())
        yield
        ending.set()


async def _kill(server: EngineServer) -> None:
    """SIGKILL; what it has started ends with it."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    server.process.kill()
    _, alive = await asyncio.to_thread(psutil.wait_procs, children, timeout=60)
    assert not alive, alive


async def _until(server: EngineServer, condition: Callable[[PolicyVersion | None], bool], seconds: float) -> None:
    async with asyncio.timeout(seconds):
        while not condition((await server.info()).version):  # noqa: ASYNC110
            await asyncio.sleep(0.1)


async def _until_staged(staging: Path) -> None:
    async with asyncio.timeout(30):
        while not any(staging.iterdir()):  # noqa: ASYNC110, ASYNC240
            await asyncio.sleep(0.001)
