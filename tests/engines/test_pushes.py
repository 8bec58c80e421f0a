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
import signal
import time
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
from tests.engines.sampled import PATIENCE_SECONDS, Completion, reference, sample
from tests.engines.stopping import assert_stops
from tests.harness import tiny_models
from tests.push.faults import Faults, FaultyPublisher

EXACT = 1e-4
PUSHES = 10
MOST_PUSHES = 60
KILLED_AT = 4
GONE_SECONDS = 60.0  # what is killed needs no more, even on a busy machine
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

    @property
    def is_full(self) -> bool:
        """Whether enough was seen for it to say something."""
        return self.num_tokens > 200 and self.num_swapped > 0 and len(self.versions) > PUSHES // 2

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
            assert np.abs(candidates[:, 0] - expected.best)[labelled].max() < EXACT, span
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
                await _kill_while_it_stages(publisher, history, server, staging if recomputed else None)
        with started_server(engine, python, settings, tmp_path) as server:
            async with _sequences(server, account, 2):
                # What goes wrong, and what a swap meets, is chance: more pushes follow until enough has been seen.
                for number in range(MOST_PUSHES):
                    if number >= PUSHES - KILLED_AT and account.is_full and _is_full(faults, publisher):
                        break
                    await _push(publisher, history, server, account)
                faults.probability = 0.0
                history.train()
                last = history.publish()
                await publisher.publish(last)
                await _until(server, lambda version: version == last.version, PATIENCE_SECONDS)
            account.assert_told_apart(await _served(server, account))
            await assert_stops(server, path, "STOP-2")
    finally:
        await learner.stop(0.0)
        await publisher.aclose()
    assert list(staging.iterdir()) == []
    assert account.is_full
    assert _is_full(faults, publisher), (faults.counts, _kinds_sent(publisher))


def _is_full(faults: Faults, publisher: FaultyPublisher) -> bool:
    return sum(faults.counts.values()) >= 3 and {"delta", "snapshot"} <= _kinds_sent(publisher)


def _kinds_sent(publisher: FaultyPublisher) -> set[str]:
    return {
        sample.labels["kind"]
        for family in publisher.metrics.published_bytes.collect()
        for sample in family.samples
        if sample.name.endswith("_total") and sample.value
    }


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


async def _kill_while_it_stages(
    publisher: FaultyPublisher, history: History, server: EngineServer, staging: Path | None
) -> None:
    """SIGKILL, with weights staged beside the engine if there is a place for that; what it has started ends with it.

    It is stopped first: whoever sees a staged file is otherwise too late for it on a busy machine. It is paused too: an
    engine that would finish its sequences before it ends never could.
    """
    for _ in range(MOST_PUSHES):
        async with server.connect() as engine:
            await engine.pause()
        history.train()
        snapshot = history.publish()
        await publisher.publish(snapshot)
        if staging is None:
            break
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(3.0):
                while not _holds_a_file(staging):  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
        if _stopped_while(server, staging):
            break
    else:
        raise AssertionError(f"nothing was met in the staging directory in {MOST_PUSHES} pushes")
    children = psutil.Process(server.process.pid).children(recursive=True)
    server.process.kill()
    _, alive = await asyncio.to_thread(psutil.wait_procs, children, timeout=GONE_SECONDS)
    assert not alive, alive


def _holds_a_file(folder: Path) -> bool:
    return any(folder.iterdir())


def _stopped_while(server: EngineServer, staging: Path) -> bool:
    """Stop the server for good if there is a staged file, which then stays."""
    server.process.send_signal(signal.SIGSTOP)
    process = psutil.Process(server.process.pid)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while process.status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < deadline
    if not _holds_a_file(staging):
        server.process.send_signal(signal.SIGCONT)
        return False
    return True


async def _until(server: EngineServer, condition: Callable[[PolicyVersion | None], bool], seconds: float) -> None:
    async with asyncio.timeout(seconds):
        while not condition((await server.info()).version):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
