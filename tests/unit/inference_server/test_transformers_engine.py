from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from inference_server.engine import Engine, GenerationEnd, GenerationRequest
from inference_server.engines.transformers.engine import TransformersEngine
from leeway.config import TransformersEngineOptions
from leeway.errors import (
    ConfigError,
    ExhaustedError,
    FencedError,
    InvalidDataError,
    PreconditionError,
    UnavailableError,
)
from leeway.types import (
    Array,
    ColumnKind,
    FinishReason,
    LogprobMode,
    SamplingParams,
    TrajectoryChunk,
    VersionSpan,
    WeightManifest,
    WeightSnapshot,
)
from tests.deadlines import WAIT_SECONDS
from tests.harness.tiny_models import CONTEXT_LENGTH, MOE_FAMILIES, VOCAB_SIZE, make_model, save, snapshot

NUM_LAYERS, EXPERTS_PER_TOKEN = 2, 2
MakeEngine = Callable[..., Awaitable[TransformersEngine]]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model(0)


@pytest.fixture(scope="module")
def model_path(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(model, tmp_path_factory.mktemp("models") / "moe")


@pytest.fixture
async def make_engine(model: PreTrainedModel, model_path: Path) -> AsyncIterator[MakeEngine]:
    """Engines that serve version 0 of `model` unless told otherwise, closed after the test."""
    engines: list[TransformersEngine] = []

    async def make(path: Path = model_path, *, served: PreTrainedModel | None = model, **options: Any) -> Any:
        engine = TransformersEngine(path, TransformersEngineOptions(**options))
        engines.append(engine)
        if served is not None:
            await engine.update_weights(snapshot(served))
        return engine

    yield make
    for engine in engines:
        await engine.aclose()


@dataclasses.dataclass
class Completion:
    """Everything one request gave, its columns joined."""

    prompt: list[int]
    chunks: list[TrajectoryChunk] = dataclasses.field(default_factory=list)
    end: GenerationEnd | None = None

    def column(self, kind: ColumnKind) -> Array:
        """The column's values; its ranges must follow each other from where the contract says they start."""
        columns = [column for chunk in self.chunks for column in chunk.columns if column.kind == kind]
        expected_start = 0 if kind == ColumnKind.ROUTING else len(self.prompt)
        for column in columns:
            assert column.start_token == expected_start
            assert column.values.shape[0] == column.end_token - column.start_token
            expected_start = column.end_token
        return np.concatenate([column.values for column in columns])

    @property
    def sampled(self) -> list[int]:
        return self.column(ColumnKind.TOKEN_IDS).tolist()

    @property
    def token_ids(self) -> list[int]:
        return self.prompt + self.sampled

    @property
    def logprobs(self) -> Array:
        return self.column(ColumnKind.BEHAVIOR_LOGPROBS)

    @property
    def spans(self) -> list[VersionSpan]:
        """Version spans, neighbours of one version joined; they must cover the sampled tokens."""
        joined: list[VersionSpan] = []
        expected_start = len(self.prompt)
        for span in (span for chunk in self.chunks for span in chunk.version_spans):
            assert span.start_token == expected_start < span.end_token
            expected_start = span.end_token
            if joined and joined[-1].version == span.version:
                span = VersionSpan(joined.pop().start_token, span.end_token, span.version)
            joined.append(span)
        assert expected_start == len(self.token_ids)
        return joined


def make_request(prompt: Sequence[int], **sampling: Any) -> GenerationRequest:
    params = dataclasses.replace(SamplingParams(max_tokens=12), **sampling)
    return GenerationRequest(f"request-{sampling.get('seed', 0)}", np.array(prompt, np.int32), params)


async def complete(engine: TransformersEngine, request: GenerationRequest) -> Completion:
    completion = Completion(request.prompt_token_ids.tolist())
    async with aclosing(engine.generate(request)) as items:
        async for item in items:
            assert completion.end is None
            if isinstance(item, GenerationEnd):
                completion.end = item
            else:
                completion.chunks.append(item)
    assert completion.end is not None
    assert completion.end.num_tokens == len(completion.sampled)
    return completion


def random_prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [draw.integers(2, VOCAB_SIZE, length).tolist() for length in lengths]


@torch.no_grad()
def full_forward(model: PreTrainedModel, token_ids: Sequence[int], temperature: float = 1.0) -> torch.Tensor:
    """Log-probs [n - 1, V] of every next token, in one forward without a cache."""
    logits = model(input_ids=torch.tensor([token_ids[:-1]]), use_cache=False).logits[0]
    return torch.log_softmax(logits.float() / temperature, dim=-1)


@torch.no_grad()
def full_routing(model: PreTrainedModel, token_ids: Sequence[int]) -> Array:
    """Routing [n - 1, L, k] that the routers choose in one forward without a cache, in slot order."""
    chosen: list[torch.Tensor] = []
    gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    handles = [gate.register_forward_hook(lambda _m, _i, output: chosen.append(output[2])) for gate in gates]
    model(input_ids=torch.tensor([token_ids[:-1]]), use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.stack(chosen, dim=1).numpy()


def expected_logprobs(model: PreTrainedModel, completion: Completion, temperature: float = 1.0) -> Array:
    logprobs = full_forward(model, completion.token_ids, temperature)[len(completion.prompt) - 1 :]
    return logprobs.gather(1, torch.tensor(completion.sampled)[:, None])[:, 0].numpy()


class Stepper:
    """Pauses an engine after given numbers of decode steps, from inside its loop: no test depends on timing."""

    def __init__(self, engine: TransformersEngine, *pause_after: int) -> None:
        self.num_steps = 0
        self._engine = engine
        self._pause_after = pause_after
        self._paused = asyncio.Event()
        self._event_loop = asyncio.get_running_loop()
        self._step = engine._thread._batch.step
        engine._thread._batch.step = self._counted_step

    def _counted_step(self, version: Any) -> None:
        self._step(version)
        self.num_steps += 1
        if self.num_steps in self._pause_after:
            self._engine._thread.pause()
            self._event_loop.call_soon_threadsafe(self._paused.set)

    async def paused(self) -> None:
        """Wait until the loop has paused of its own accord."""
        async with asyncio.timeout(WAIT_SECONDS):
            await self._paused.wait()
        self._paused.clear()
        await self._engine.pause()


async def first_chunk(items: AsyncGenerator[TrajectoryChunk | GenerationEnd, None]) -> TrajectoryChunk:
    item = await anext(items)
    assert isinstance(item, TrajectoryChunk)
    return item


async def started(engine: TransformersEngine, requests: Sequence[GenerationRequest]) -> list[asyncio.Task[Completion]]:
    """Tasks whose requests are queued, in order."""
    tasks = [asyncio.create_task(complete(engine, request)) for request in requests]
    await asyncio.sleep(0)
    return tasks


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("qwen3_moe", {}),
        ("qwen3_moe", {"num_hidden_layers": 4, "decoder_sparse_step": 2}),
        ("mixtral", {}),
        ("deepseek_v3", {}),
        ("deepseek_v3", {"q_lora_rank": None, "rope_interleave": False, "norm_topk_prob": False}),
    ],
)
async def test_logprobs_and_routing_match_a_full_forward_with_requests_joining_in_flight(
    family: str, overrides: dict[str, Any], tmp_path: Path, make_engine: MakeEngine
) -> None:
    """A prompt's rows are its own: not its padding's, not its neighbour's, not an earlier forward's."""
    model = make_model(0, family=family, **overrides)
    path = save(model, tmp_path / family)
    engine = await make_engine(path, served=model, max_concurrency=5, chunk_tokens=3, prefill_tokens=16)
    stepper = Stepper(engine, 4, 9)
    prompts = random_prompts([3, 9, 1, 7, 7, 12, 2, 30, 5])
    prompts[4] = prompts[3]  # fed once, sampled twice
    temperatures = [1.0, 0.7, 1.3, 1.0, 0.5, 1.0, 2.0, 1.0, 1.0]
    requests = [
        make_request(prompt, seed=index, temperature=temperature, max_tokens=8 + index, routing=index != 2)
        for index, (prompt, temperature) in enumerate(zip(prompts, temperatures, strict=True))
    ]

    tasks: list[asyncio.Task[Completion]] = []
    for joining in (requests[:3], requests[3:5], requests[5:]):
        tasks += await started(engine, joining)
        if len(tasks) < len(requests):
            await stepper.paused()
            await engine.resume()
    completions = await asyncio.gather(*tasks)

    for completion, request in zip(completions, requests, strict=True):
        expected = expected_logprobs(model, completion, request.sampling.temperature)
        np.testing.assert_allclose(completion.logprobs, expected, atol=2e-5)
        if request.sampling.routing:
            routing = completion.column(ColumnKind.ROUTING)
            assert routing.dtype == np.uint8
            assert routing.shape == (len(completion.token_ids) - 1, NUM_LAYERS, EXPERTS_PER_TOKEN)
            np.testing.assert_array_equal(routing, full_routing(model, completion.token_ids))
        else:
            assert all(column.kind != ColumnKind.ROUTING for chunk in completion.chunks for column in chunk.columns)


@pytest.mark.parametrize("family", MOE_FAMILIES)
async def test_rows_of_prompts_padded_together_are_their_own(
    family: str, tmp_path: Path, make_engine: MakeEngine
) -> None:
    """Padding is routed too: rows counted before it is taken off would be a neighbour's, or repeat."""
    model = make_model(0, family=family)
    engine = await make_engine(save(model, tmp_path / family), served=model)
    await engine.pause()  # so that all are fed together
    prompts = random_prompts([2, 13, 5, 13])
    tasks = await started(engine, [make_request(p, seed=i, routing=True) for i, p in enumerate(prompts)])
    await engine.resume()
    for completion in await asyncio.gather(*tasks):
        expected = full_routing(model, completion.token_ids)
        np.testing.assert_array_equal(completion.column(ColumnKind.ROUTING), expected)
        assert (np.diff(np.sort(expected), axis=-1) > 0).all()


@torch.no_grad()
def logprobs_across_swap(
    old: PreTrainedModel, new: PreTrainedModel, token_ids: Sequence[int], fed: int
) -> torch.Tensor:
    """Log-probs [n - 1, V] where the first `fed` tokens were fed to `old` and the others, on its keys, to `new`."""
    cache = DynamicCache()
    first = old(input_ids=torch.tensor([token_ids[:fed]]), past_key_values=cache, use_cache=True).logits
    then = new(input_ids=torch.tensor([token_ids[fed:-1]]), past_key_values=cache, use_cache=True).logits
    return torch.log_softmax(torch.cat([first, then], dim=1)[0], dim=-1)


@pytest.mark.parametrize(
    ("family", "chunk_tokens"), [("qwen3_moe", 1), ("qwen3_moe", 4), ("qwen3_moe", 100), ("deepseek_v3", 4)]
)
async def test_a_swap_in_mid_sequence_splits_spans_where_the_weights_changed(
    family: str, chunk_tokens: int, tmp_path: Path, make_engine: MakeEngine
) -> None:
    model, other = make_model(0, family=family), make_model(1, family=family)
    engine = await make_engine(save(model, tmp_path / family), served=model, chunk_tokens=chunk_tokens)
    old, new = snapshot(model), snapshot(other, 1)
    num_steps = 8
    stepper = Stepper(engine, num_steps)
    prompts = random_prompts([4, 9])
    await engine.pause()  # so that both begin in the same step
    tasks = await started(engine, [make_request(prompt, seed=5, max_tokens=20) for prompt in prompts])
    await engine.resume()
    await stepper.paused()
    assert engine.info().version == old.version

    assert await engine.update_weights(new) >= 0
    assert engine.info().version == new.version
    await engine.resume()
    completions = await asyncio.gather(*tasks)

    for completion in completions:
        swap_token = len(completion.prompt) + 1 + num_steps  # prefill samples one token, each step one more
        assert completion.spans == [
            VersionSpan(len(completion.prompt), swap_token, old.version),
            VersionSpan(swap_token, len(completion.token_ids), new.version),
        ]
        # The last token sampled by the old weights is the first one fed to the new ones.
        logprobs = logprobs_across_swap(model, other, completion.token_ids, swap_token - 1)
        chosen = logprobs[len(completion.prompt) - 1 :].gather(1, torch.tensor(completion.sampled)[:, None])[:, 0]
        np.testing.assert_allclose(completion.logprobs, chosen.numpy(), atol=2e-5)
        only_old = expected_logprobs(model, completion)
        num_old = swap_token - len(completion.prompt)
        assert np.abs(completion.logprobs - only_old)[num_old:].max() > 1
    fresh = await complete(engine, make_request([3, 4, 5], seed=6))
    np.testing.assert_allclose(fresh.logprobs, expected_logprobs(other, fresh), atol=2e-5)
    assert [span.version for span in fresh.spans] == [new.version]


async def test_weights_arrive_as_published(make_engine: MakeEngine, model: PreTrainedModel) -> None:
    engine = await make_engine(served=None)
    await engine.update_weights(snapshot(model, dtype_name="bfloat16"))
    rounded = make_model(0)
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    completion = await complete(engine, make_request([3, 4, 5], max_tokens=30))
    np.testing.assert_allclose(completion.logprobs, expected_logprobs(rounded, completion), atol=2e-5)
    assert np.abs(completion.logprobs - expected_logprobs(model, completion)).max() > 1e-3


async def test_a_sample_does_not_depend_on_its_batch(make_engine: MakeEngine) -> None:
    engine = await make_engine(max_concurrency=6)
    alone = [await complete(engine, make_request([5, 6, 7], seed=seed, max_tokens=30)) for seed in (1, 2)]
    assert alone[0].sampled != alone[1].sampled

    others = [make_request(prompt, seed=index) for index, prompt in enumerate(random_prompts([1, 8, 20, 3, 3, 14, 9]))]
    mixed = [*others[:4], make_request([5, 6, 7], seed=1, max_tokens=30), *others[4:]]
    mixed.append(make_request([5, 6, 7], seed=2, max_tokens=30))
    together = await asyncio.gather(*(complete(engine, request) for request in mixed))

    for reference, completion in zip(alone, (together[4], together[-1]), strict=True):
        assert completion.sampled == reference.sampled
        np.testing.assert_allclose(completion.logprobs, reference.logprobs, atol=2e-5)


async def test_candidates_match_a_full_forward(make_engine: MakeEngine, model: PreTrainedModel) -> None:
    engine = await make_engine()
    three, five, none = await asyncio.gather(
        complete(engine, make_request([3, 4, 5], seed=1, topk=3, temperature=0.8)),
        complete(engine, make_request([7, 8], seed=2, topk=5)),
        complete(engine, make_request([9], seed=3)),
    )
    for completion, topk, temperature in ((three, 3, 0.8), (five, 5, 1.0)):
        logprobs = full_forward(model, completion.token_ids, temperature)[len(completion.prompt) - 1 :]
        expected = logprobs.topk(topk)
        np.testing.assert_array_equal(completion.column(ColumnKind.TOPK_TOKEN_IDS), expected.indices.numpy())
        np.testing.assert_allclose(completion.column(ColumnKind.TOPK_LOGPROBS), expected.values.numpy(), atol=5e-5)
    kinds = {column.kind for chunk in none.chunks for column in chunk.columns}
    assert kinds == {ColumnKind.TOKEN_IDS, ColumnKind.BEHAVIOR_LOGPROBS}


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])  # the latter caches latents of two sizes
async def test_the_cache_grows_up_to_the_context(family: str, tmp_path: Path, make_engine: MakeEngine) -> None:
    long = make_model(0, family=family, max_position_embeddings=200)
    engine = await make_engine(save(long, tmp_path / "long"), served=long)
    short_prompt, long_prompt = random_prompts([10, 90])
    completions = await asyncio.gather(
        complete(engine, make_request(short_prompt, seed=1, max_tokens=1000)),
        complete(engine, make_request(long_prompt, seed=2, max_tokens=20)),
    )
    assert [completion.end.finish_reason for completion in completions if completion.end] == [
        FinishReason.CONTEXT,
        FinishReason.LENGTH,
    ]
    assert len(completions[0].token_ids) == 200
    for completion in completions:
        np.testing.assert_allclose(completion.logprobs, expected_logprobs(long, completion), atol=5e-5)


async def test_finish_reasons(make_engine: MakeEngine) -> None:
    engine = await make_engine()
    free = await complete(engine, make_request([3, 4, 5], seed=1))
    stop_token = free.sampled[4]
    stopped = await complete(engine, make_request([3, 4, 5], seed=1, stop_token_ids=(stop_token, 31)))
    assert stopped.sampled == free.sampled[: free.sampled.index(stop_token) + 1]
    prompt = random_prompts([CONTEXT_LENGTH - 3])[0]
    full = await complete(engine, make_request(prompt))
    exact = await complete(engine, make_request(prompt, max_tokens=3))
    one = await complete(engine, make_request(prompt, max_tokens=1))
    ends = [completion.end for completion in (free, stopped, full, exact, one)]
    assert [(end.finish_reason, end.num_tokens) for end in ends if end] == [
        (FinishReason.LENGTH, 12),
        (FinishReason.STOP, len(stopped.sampled)),
        (FinishReason.CONTEXT, 3),
        (FinishReason.LENGTH, 3),
        (FinishReason.LENGTH, 1),
    ]
    assert all(end.started_at <= end.finished_at for end in ends if end)
    assert all(end.started_at.tzinfo is not None for end in ends if end)


async def test_chunks_carry_the_configured_number_of_tokens(make_engine: MakeEngine) -> None:
    engine = await make_engine(chunk_tokens=5)
    completion = await complete(engine, make_request([3, 4, 5], max_tokens=12, routing=True))
    assert [chunk.columns[0].end_token - chunk.columns[0].start_token for chunk in completion.chunks] == [5, 5, 2]
    assert all(not chunk.segments for chunk in completion.chunks)
    assert completion.column(ColumnKind.ROUTING).shape[0] == 3 + 12 - 1


async def test_closing_the_iterator_frees_the_slot(make_engine: MakeEngine) -> None:
    engine = await make_engine(max_concurrency=1, chunk_tokens=1)
    stepper = Stepper(engine, 3)
    items = engine.generate(make_request([3, 4, 5], seed=1, max_tokens=40))
    await first_chunk(items)
    (waiting,) = await started(engine, [make_request([6, 7], seed=2)])
    cancelled_in_queue = engine.generate(make_request([8], seed=3))
    queued = asyncio.create_task(anext(cancelled_in_queue))
    await stepper.paused()
    queued.cancel()
    with pytest.raises(asyncio.CancelledError):
        await queued

    await items.aclose()
    await engine.pause()
    await engine.pause()  # answered after the iteration that dropped what was cancelled
    assert engine._thread._batch.num_rows == 0
    assert len(engine._thread._queued) == 1

    await engine.resume()
    assert (await waiting).end is not None


async def test_rows_stay_right_when_sequences_before_them_leave(
    make_engine: MakeEngine, model: PreTrainedModel
) -> None:
    engine = await make_engine(max_concurrency=8)
    lengths = [2, 25, 4, 30, 6, 20, 1, 28]
    prompts = random_prompts([3, 5, 9, 2, 11, 4, 6, 8])
    completions = await asyncio.gather(
        *(
            complete(engine, make_request(prompt, seed=index, max_tokens=length, routing=True))
            for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
        )
    )
    for completion in completions:
        np.testing.assert_allclose(completion.logprobs, expected_logprobs(model, completion), atol=2e-5)
        np.testing.assert_array_equal(completion.column(ColumnKind.ROUTING), full_routing(model, completion.token_ids))


async def test_nothing_is_decoded_while_paused(make_engine: MakeEngine) -> None:
    engine = await make_engine()
    stepper = Stepper(engine, 2)
    (running,) = await started(engine, [make_request([3, 4, 5], seed=1)])
    await stepper.paused()
    (queued,) = await started(engine, [make_request([6, 7], seed=2)])
    # Each of these is answered by the loop, which has seen the queued request by then.
    await engine.pause()
    await engine.update_weights(snapshot(make_model(1), 1))
    await engine.pause()
    assert stepper.num_steps == 2
    assert engine._thread._batch.num_rows == 1
    await engine.resume()
    await engine.resume()
    assert [(await task).end is not None for task in (running, queued)] == [True, True]


async def test_idle_and_paused_engines_take_new_weights(make_engine: MakeEngine) -> None:
    engine = await make_engine()
    await engine.update_weights(snapshot(make_model(1), 1))
    await engine.pause()
    newest = snapshot(make_model(2), 2)
    await engine.update_weights(newest)
    assert engine.info().version == newest.version


async def test_closing_ends_open_iterators(make_engine: MakeEngine) -> None:
    engine = await make_engine(max_concurrency=1)
    stepper = Stepper(engine, 2)
    tasks = await started(engine, [make_request([3, 4], seed=seed) for seed in (1, 2)])
    await stepper.paused()
    await engine.aclose()
    for task in tasks:
        with pytest.raises(UnavailableError, match="the engine stops"):
            await task
    with pytest.raises(UnavailableError, match="the engine stops"):
        await complete(engine, make_request([3]))
    with pytest.raises(UnavailableError, match="the engine stops"):
        await engine.pause()
    await engine.aclose()


async def test_an_error_in_the_loop_reaches_everyone_and_marks_the_engine_failed(make_engine: MakeEngine) -> None:
    engine = await make_engine(max_concurrency=1)
    stepper = Stepper(engine, 1)

    async def waiting() -> None:
        await engine.update_weights(snapshot(make_model(1), 1))

    tasks = await started(engine, [make_request([3, 4], seed=seed) for seed in (1, 2)])
    await stepper.paused()

    def broken(version: object) -> None:
        raise MemoryError("out of\nmemory")

    engine._thread._batch.step = broken
    await engine.resume()
    for task in tasks:
        with pytest.raises(UnavailableError, match="MemoryError: out of memory"):
            await task
    for refused in (complete(engine, make_request([3])), engine.pause(), waiting()):
        with pytest.raises(UnavailableError, match="MemoryError"):
            await refused


async def test_weights_that_are_not_finite_are_an_error_not_data(make_engine: MakeEngine) -> None:
    broken = make_model(0)
    with torch.no_grad():
        broken.state_dict()["lm_head.weight"][3, 3] = torch.nan
    engine = await make_engine(served=broken)
    with pytest.raises(UnavailableError, match="not finite"):
        await complete(engine, make_request([3]))


async def test_nothing_is_sampled_before_the_first_version(make_engine: MakeEngine) -> None:
    engine = await make_engine(served=None)
    assert engine.info().version is None
    with pytest.raises(UnavailableError, match="no policy version"):
        await complete(engine, make_request([3]))


async def test_a_lower_publisher_epoch_is_fenced(make_engine: MakeEngine, model: PreTrainedModel) -> None:
    engine = await make_engine()
    newer = snapshot(make_model(1), 1, epoch=3)
    await engine.update_weights(newer)
    with pytest.raises(FencedError, match="epoch 2 are refused: epoch 3"):
        await engine.update_weights(snapshot(model, 2, epoch=2))
    assert engine.info().version == newer.version


async def test_an_update_fenced_while_staged_is_not_swapped_in(make_engine: MakeEngine, model: PreTrainedModel) -> None:
    engine = await make_engine()
    await engine.pause()
    stage = engine._stage
    newer = snapshot(make_model(1), 1, epoch=3)

    def fenced_meanwhile(snapshot: WeightSnapshot) -> Any:
        engine._thread.check_epoch(3)
        return stage(snapshot)

    engine._stage = fenced_meanwhile
    with pytest.raises(FencedError):
        await engine.update_weights(snapshot(make_model(2), 2, epoch=2))
    engine._stage = stage
    await engine.update_weights(newer)
    assert engine.info().version == newer.version


async def test_a_version_already_served_is_not_copied_again(make_engine: MakeEngine, model: PreTrainedModel) -> None:
    engine = await make_engine()
    assert await engine.update_weights(snapshot(model)) == 0.0


async def test_weights_that_do_not_fit_are_refused_and_the_old_ones_stay(
    make_engine: MakeEngine, model: PreTrainedModel
) -> None:
    engine = await make_engine()
    whole = snapshot(make_model(1), 1)
    manifest = WeightManifest(whole.manifest.tensors[1:])
    partial = dataclasses.replace(whole, manifest=manifest, buffers=whole.buffers[1:])
    with pytest.raises(PreconditionError, match=f"missing {whole.manifest.tensors[0].name}"):
        await engine.update_weights(partial)
    short = dataclasses.replace(whole, buffers=[whole.buffers[0][:-4], *whole.buffers[1:]])
    with pytest.raises(PreconditionError, match="cannot be staged"):
        await engine.update_weights(short)
    completion = await complete(engine, make_request([3, 4]))
    assert [span.version for span in completion.spans] == [snapshot(model).version]
    np.testing.assert_allclose(completion.logprobs, expected_logprobs(model, completion), atol=2e-5)


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ([], {}, "prompt is empty"),
        ([3, VOCAB_SIZE], {}, "outside the vocabulary"),
        ([3, -1], {}, "outside the vocabulary"),
        ([3] * CONTEXT_LENGTH, {}, "leaves no room"),
        ([3], {"topk": 21}, "top-21"),
        ([3], {"stop_token_ids": (VOCAB_SIZE,)}, "stop token"),
        ([3], {"temperature": 0.0}, "temperature 0.0"),
        ([3], {"temperature": float("nan")}, "temperature nan"),
        ([3], {"max_tokens": 0}, "max_tokens 0"),
        ([3], {"seed": 2**64}, "seed"),
    ],
)
async def test_bad_requests_are_refused_before_they_are_queued(
    prompt: list[int], sampling: dict[str, Any], message: str, make_engine: MakeEngine
) -> None:
    engine = await make_engine()
    with pytest.raises(InvalidDataError, match=message):
        engine.generate(make_request(prompt, **sampling))


async def test_a_shorter_context_can_be_configured(make_engine: MakeEngine) -> None:
    engine = await make_engine(context_length=10)
    with pytest.raises(InvalidDataError, match="context of 10"):
        engine.generate(make_request([3] * 10))
    completion = await complete(engine, make_request([3] * 9))
    assert completion.end is not None
    assert completion.end.finish_reason == FinishReason.CONTEXT
    with pytest.raises(ConfigError, match="context_length 1000"):
        await make_engine(context_length=1000)


async def test_more_requests_than_may_wait_are_refused(make_engine: MakeEngine) -> None:
    engine = await make_engine(max_concurrency=1, max_queued=1)
    await engine.pause()
    tasks = await started(engine, [make_request([3], seed=seed) for seed in range(3)])
    await engine.resume()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [Completion, Completion, ExhaustedError]


async def test_a_dense_model_decodes_but_has_no_routing(tmp_path: Path, make_engine: MakeEngine) -> None:
    dense = make_model(0, moe=False, tie_word_embeddings=True)
    engine = await make_engine(save(dense, tmp_path / "dense"), served=dense)
    assert not engine.info().routing
    with pytest.raises(InvalidDataError, match="routing"):
        engine.generate(make_request([3], routing=True))
    completion = await complete(engine, make_request([3, 4, 5], max_tokens=20))
    np.testing.assert_allclose(completion.logprobs, expected_logprobs(dense, completion), atol=2e-5)


async def test_routing_of_many_experts_is_uint16(tmp_path: Path, make_engine: MakeEngine) -> None:
    many = make_model(0, num_experts=300, num_hidden_layers=1)
    engine = await make_engine(save(many, tmp_path / "many"), served=many)
    completion = await complete(engine, make_request([3, 4, 5], routing=True, max_tokens=30))
    routing = completion.column(ColumnKind.ROUTING)
    assert routing.dtype == np.uint16
    assert routing.max() > 255
    np.testing.assert_array_equal(routing, full_routing(many, completion.token_ids))


async def test_info(make_engine: MakeEngine) -> None:
    engine: Engine = await make_engine(max_concurrency=7)
    info = engine.info()
    assert info.engine.startswith("transformers/5.")
    assert info.logprob_mode == LogprobMode.SAMPLED
    assert (info.max_topk, info.routing, info.max_concurrency) == (20, True, 7)
    assert (info.signature.moe_layers, info.signature.experts) == (NUM_LAYERS, 6)


async def test_bfloat16_compute_decodes(make_engine: MakeEngine, model: PreTrainedModel) -> None:
    engine = await make_engine(dtype="bfloat16")
    completion = await complete(engine, make_request([3, 4, 5], routing=True, topk=2))
    assert completion.logprobs.dtype == np.float32
    assert np.abs(completion.logprobs - expected_logprobs(model, completion)).max() > 1e-3


async def test_models_that_cannot_share_a_batch_are_refused(tmp_path: Path, make_engine: MakeEngine) -> None:
    sliding = make_model(0, moe=False, use_sliding_window=True, sliding_window=8, max_window_layers=0)
    with pytest.raises(ConfigError, match="full attention only"):
        await make_engine(save(sliding, tmp_path / "sliding"))
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    dynamic = make_model(0, moe=False, rope_parameters=rope)
    with pytest.raises(ConfigError, match="dynamic rotary"):
        await make_engine(save(dynamic, tmp_path / "dynamic"))
