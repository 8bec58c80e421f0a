"""Every MoE family: what the engine samples and routes is what the learner computes, over one turn and over two."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch

from inference_server.engine import GenerationEnd, GenerationRequest
from inference_server.engines.transformers.engine import TransformersEngine
from learner.trainer import UnusableGroupError
from learner.training.torch_trainer import TorchTrainer
from leeway.config import TrainingOptions, TransformersEngineOptions
from leeway.errors import InvalidDataError
from leeway.huggingface import load_model
from leeway.trajectory.assembly import join_chunks
from leeway.types import (
    Array,
    Column,
    ColumnKind,
    FinishReason,
    Int32Array,
    SamplingParams,
    Segment,
    SegmentKind,
    Trajectory,
    TrajectoryChunk,
    TrajectoryClose,
    TrajectoryGroup,
    TrajectoryRecord,
    VersionSpan,
)
from tests.contract.sampled_groups import largest_difference, sample_group, snapshot, with_other_experts
from tests.harness.tiny_models import MOE_FAMILIES, VOCAB_SIZE, make_model, save

SAMPLING = SamplingParams(0.9, 10, (1,), routing=True)
every_family = pytest.mark.parametrize("family", MOE_FAMILIES)


def make_trainer(path: Path, **options: object) -> TorchTrainer:
    torch.set_num_threads(1)
    settings = {"publish_dtype": "float32", "routing_replay": True, "learning_rate": 1e-2, "row_tokens": 40, **options}
    return TorchTrainer.from_directory(path, TrainingOptions.model_validate(settings))


def random_prompts(*lengths: int) -> list[Int32Array]:
    draw = np.random.default_rng(5)
    return [draw.integers(2, VOCAB_SIZE, length).astype(np.int32) for length in lengths]


async def sample_groups(engine: TransformersEngine) -> list[TrajectoryGroup]:
    """Prompts of different lengths, so that they are padded together."""
    prompts = enumerate(random_prompts(3, 11, 1, 7))
    sampled = (sample_group(engine, index, prompt, (0.0, 1.0, 2.0), SAMPLING) for index, prompt in prompts)
    return await asyncio.gather(*sampled)


@torch.no_grad()
def native_routing(path: Path, t: Trajectory) -> Array:
    """[n - 1, L, k] that transformers' model in `path` chooses in one forward over the whole trajectory."""
    model = load_model(path, torch.float32)
    chosen: list[torch.Tensor] = []
    for layer in model.model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.register_forward_hook(lambda _m, _i, output: chosen.append(output[2]))
    model(input_ids=torch.tensor(t.token_ids[None, :-1].astype(np.int64)), use_cache=False)
    return torch.stack(chosen, dim=1).numpy()


@every_family
async def test_logprobs_and_routing_agree_before_and_after_an_update(family: str, tmp_path: Path) -> None:
    path = save(make_model(0, family=family), tmp_path / "model")
    trainer = make_trainer(path)
    engine = TransformersEngine(path, TransformersEngineOptions(chunk_tokens=3))
    try:
        for step in (1, 2):  # the second time with weights that a real step has moved
            await engine.update_weights(snapshot(trainer, step - 1))
            trainer.export(path, tmp_path / f"served-{step}")
            groups = await sample_groups(engine)
            result = trainer.train_step(step, groups)
            assert result.statistics["grad_norm"] > 0
            assert largest_difference(result.policy_logprobs, groups) < 1e-4
            for group in groups:
                for t in group.trajectories:
                    assert t.routing is not None
                    np.testing.assert_array_equal(t.routing, native_routing(tmp_path / f"served-{step}", t))
    finally:
        await engine.aclose()


@every_family
async def test_replay_decides_the_experts(family: str, tmp_path: Path) -> None:
    """Natively routed equal weights agree; with another trajectory's routing the log-probs part."""
    path = save(make_model(0, family=family), tmp_path / "model")
    engine = TransformersEngine(path, TransformersEngineOptions())
    try:
        await engine.update_weights(snapshot(make_trainer(path), 0))
        groups = await sample_groups(engine)
    finally:
        await engine.aclose()
    native = make_trainer(path, routing_replay=False).train_step(1, groups)
    assert largest_difference(native.policy_logprobs, groups) < 1e-4
    elsewhere = make_trainer(path).train_step(1, with_other_experts(groups, 6))
    assert largest_difference(elsewhere.policy_logprobs, groups) > 0.1


async def sample_turn(engine: TransformersEngine, prompt: Int32Array, name: str) -> list[TrajectoryChunk]:
    request = GenerationRequest(name, prompt, replace(SAMPLING, seed=len(prompt), stop_token_ids=()))
    items = [item async for item in engine.generate(request)]
    return [item for item in items if not isinstance(item, GenerationEnd)]


def column(chunks: list[TrajectoryChunk], kind: ColumnKind) -> Array:
    return np.concatenate([c.values for chunk in chunks for c in chunk.columns if c.kind is kind])


def spans(chunks: list[TrajectoryChunk]) -> tuple[VersionSpan, ...]:
    return tuple(span for chunk in chunks for span in chunk.version_spans)


async def two_turns(engine: TransformersEngine, prompt: Int32Array) -> tuple[TrajectoryChunk, Array, Array]:
    """A conversation as one chunk without routing, and the routing of each of its turns.

    The last token of the first turn is not fed until the second turn begins: only that turn's rows cover it.
    """
    first = await sample_turn(engine, prompt, "first")
    sampled = column(first, ColumnKind.TOKEN_IDS)
    reply = np.array([9, 4, 7], np.int32)  # the environment's
    history = np.concatenate([prompt, sampled, reply]).astype(np.int32)
    second = await sample_turn(engine, history, "second")
    token_ids = np.concatenate([history, column(second, ColumnKind.TOKEN_IDS)]).astype(np.int32)
    turn = len(prompt) + len(sampled)
    segments = (
        Segment(SegmentKind.PROMPT, 0, len(prompt)),
        Segment(SegmentKind.MODEL, len(prompt), turn, in_loss=True, sampling=SAMPLING),
        Segment(SegmentKind.ENVIRONMENT, turn, len(history)),
        Segment(SegmentKind.MODEL, len(history), len(token_ids), in_loss=True, sampling=SAMPLING),
    )
    logprobs = [
        Column(ColumnKind.BEHAVIOR_LOGPROBS, start, end, column(chunks, ColumnKind.BEHAVIOR_LOGPROBS))
        for chunks, start, end in ((first, len(prompt), turn), (second, len(history), len(token_ids)))
    ]
    columns = (Column(ColumnKind.TOKEN_IDS, 0, len(token_ids), token_ids), *logprobs)
    chunk = TrajectoryChunk(columns, segments, spans(first) + spans(second))
    return chunk, column(first, ColumnKind.ROUTING), column(second, ColumnKind.ROUTING)


def joined(chunk: TrajectoryChunk, member: int, *routing: tuple[int, Array]) -> Trajectory:
    """The trajectory of a chunk with routing columns, each (start, rows)."""
    columns = tuple(Column(ColumnKind.ROUTING, start, start + len(rows), rows) for start, rows in routing)
    now = datetime.now(UTC)
    num_tokens = chunk.columns[0].end_token
    close = TrajectoryClose(1, num_tokens, b"", FinishReason.LENGTH, float(member), now, now)
    record = TrajectoryRecord(f"turns-{member}", member, 1, "server-0", close, "", ())
    return join_chunks([replace(chunk, columns=chunk.columns + columns)], record, close)


@every_family
async def test_a_second_turn_routes_the_last_token_of_the_first(family: str, tmp_path: Path) -> None:
    """Both turns agree with the learner; the boundary token left out or at zero is refused, by trajectory."""
    path = save(make_model(0, family=family), tmp_path / "model")
    trainer = make_trainer(path)
    engine = TransformersEngine(path, TransformersEngineOptions())
    try:
        await engine.update_weights(snapshot(trainer, 0))
        conversations = [await two_turns(engine, prompt) for prompt in random_prompts(5, 2)]
    finally:
        await engine.aclose()

    chunk, first, second = conversations[1]
    boundary = len(first)  # the first turn's last token
    assert len(second) == chunk.columns[0].end_token - 1
    np.testing.assert_array_equal(second[:boundary], first)
    with pytest.raises(InvalidDataError, match="routing must cover every token but the last"):
        joined(chunk, 1, (0, first), (boundary + 1, second[boundary + 1 :]))
    zeroed = second.copy()
    zeroed[boundary] = 0
    good = joined(conversations[0][0], 0, (0, conversations[0][2]))
    bad = TrajectoryGroup("turns", 0, (good, joined(chunk, 1, (0, zeroed))))
    with pytest.raises(UnusableGroupError, match=rf"trajectory turns-1: token {boundary} names an expert twice"):
        trainer.train_step(1, [bad])

    whole = joined(chunk, 1, (0, first), (boundary, second[boundary:]))
    np.testing.assert_array_equal(whole.routing, native_routing(path, whole))
    group = TrajectoryGroup("turns", 0, (good, whole))
    assert largest_difference(trainer.train_step(1, [group]).policy_logprobs, [group]) < 1e-4
