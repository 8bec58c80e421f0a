"""With equal published weights the learner computes what the engine sampled from: R3 and provenance, checked.

The real engine and the real trainer on the shipped models; between them the wire form, as in a run.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.sortmix8.task import tasks
from inference_server.engines.transformers.engine import TransformersEngine
from inference_server.rollout.text import HuggingFaceTokenizer, prompt_token_ids
from learner.training.torch_trainer import TorchTrainer
from leeway.config import TrainingOptions, TransformersEngineOptions
from leeway.types import SamplingParams, TrajectoryGroup
from tests.contract.sampled_groups import largest_difference, sample_group, snapshot, with_other_experts

EXAMPLE = Path(__file__).parents[2] / "examples" / "sortmix8"
MEMBERS = 4


def make_trainer(model: str, **options: object) -> TorchTrainer:
    torch.set_num_threads(1)
    settings = {"publish_dtype": "float32", "routing_replay": model == "model-moe", "learning_rate": 1e-2, **options}
    return TorchTrainer.from_directory(EXAMPLE / model, TrainingOptions.model_validate(settings))


async def sample_groups(
    engine: TransformersEngine,
    count: int,
    sampling: SamplingParams | None = None,
    first_chunk: asyncio.Event | None = None,
) -> list[TrajectoryGroup]:
    """One group per task; rewards differ within a group, so that every trajectory carries a gradient."""
    tokenizer = HuggingFaceTokenizer(EXAMPLE / "model-moe", chat=False)
    sampling = sampling or SamplingParams(1.0, 9, (1,), routing=engine.info().routing)
    on_chunk = (first_chunk or asyncio.Event()).set
    rewards = [float(member) for member in range(MEMBERS)]
    prompts = [prompt_token_ids(tokenizer, task) for task in tasks("train", count, seed=3)]
    return await asyncio.gather(
        *(sample_group(engine, index, prompt, rewards, sampling, on_chunk) for index, prompt in enumerate(prompts))
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("model", ["model-moe", "model-dense"])
async def test_logprobs_agree_before_and_after_an_update(model: str, temperature: float) -> None:
    trainer = make_trainer(model)
    engine = TransformersEngine(EXAMPLE / model, TransformersEngineOptions())
    try:
        for step in (1, 2):  # the second time with weights that a real step has moved
            await engine.update_weights(snapshot(trainer, step - 1))
            sampling = SamplingParams(temperature, 9, (1,), routing=engine.info().routing)
            groups = await sample_groups(engine, 6, sampling)
            result = trainer.train_step(step, groups)
            assert largest_difference(dict(result.policy_logprobs), groups) < 1e-4
    finally:
        await engine.aclose()


async def test_replayed_routing_is_the_engines_and_it_matters() -> None:
    """Native routing of equal weights equals the engine's; with another routing the log-probs part."""
    trainer = make_trainer("model-moe")
    engine = TransformersEngine(EXAMPLE / "model-moe", TransformersEngineOptions())
    try:
        await engine.update_weights(snapshot(trainer, 0))
        groups = await sample_groups(engine, 6)
    finally:
        await engine.aclose()
    native = make_trainer("model-moe", routing_replay=False).train_step(1, groups)
    assert largest_difference(dict(native.policy_logprobs), groups) < 1e-4
    elsewhere = trainer.train_step(1, with_other_experts(groups, 8))
    assert largest_difference(dict(elsewhere.policy_logprobs), groups) > 0.1


async def test_weights_swapped_in_mid_sequence_are_labelled_where_they_sampled() -> None:
    """Tokens before the swap agree with the old weights, and those after it do not: the spans say where it was."""
    trainer, old = make_trainer("model-moe"), make_trainer("model-moe")
    engine = TransformersEngine(EXAMPLE / "model-moe", TransformersEngineOptions(chunk_tokens=1))
    first_chunk = asyncio.Event()
    try:
        await engine.update_weights(snapshot(trainer, 0))
        trainer.train_step(1, await sample_groups(engine, 4))
        long = SamplingParams(1.0, 50, (), routing=True)  # no stop token: every sequence is cut somewhere in its middle
        sampling = asyncio.create_task(sample_groups(engine, 4, long, first_chunk))
        await first_chunk.wait()
        await engine.update_weights(snapshot(trainer, 1))
        groups = await sampling
    finally:
        await engine.aclose()
    policy_logprobs = old.train_step(1, groups).policy_logprobs
    for trajectory in (trajectory for group in groups for trajectory in group.trajectories):
        behavior = trajectory.behavior_logprobs[trajectory.loss_mask]
        difference = np.abs(policy_logprobs[trajectory.trajectory_id] - behavior)
        prompt = trajectory.num_tokens - len(behavior)
        newer = np.zeros(len(behavior), dtype=bool)
        for span in trajectory.version_spans:
            newer[span.start_token - prompt : span.end_token - prompt] = span.version.step == 1
        assert 0 < newer.sum() < len(newer)
        assert (np.diff(newer.astype(int)) >= 0).all()
        assert difference[~newer].max() < 1e-4
        assert difference[newer].max() > 1e-2
