"""Real steps: groups sampled by the transformers engine, trained on by the torch trainer, published in bfloat16."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.sortmix8.task import reward as sorted_reward
from examples.sortmix8.task import tasks
from inference_server.engine import GenerationEnd, GenerationRequest
from inference_server.engines.transformers.engine import TransformersEngine
from inference_server.rollout.text import HuggingFaceTokenizer
from inference_server.rollout.trajectory_recorder import TrajectoryRecorder
from learner.training.torch_trainer import TorchTrainer
from leeway.config import SamplingOptions, TrainingOptions, TransformersEngineOptions
from leeway.trajectory.assembly import assemble_trajectory
from leeway.types import (
    PolicyVersion,
    Purpose,
    Ticket,
    TicketMember,
    Trajectory,
    TrajectoryClose,
    TrajectoryGroup,
    TrajectoryRecord,
    WeightSnapshot,
)
from leeway.weights.digests import weights_digest

EXAMPLE = Path(__file__).parents[2] / "examples" / "sortmix8"
RUN = "weight-push"
Reward = Callable[[dict[str, Any], str], float]


def any_reward(task: dict[str, Any], completion: str) -> float:
    """Differs between completions, so that weights that know nothing yet have a gradient."""
    return zlib.crc32(f"{task['letters']}{completion}".encode()) % 1000 / 1000


def larger_model(folder: Path, hidden: int, layers: int) -> Path:
    """A dense Qwen3 at random weights with the example's tokenizer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        head_dim=64,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EXAMPLE / "model-dense" / name, folder / name)
    return folder


class Training:
    """A trainer and the engine that samples for it, always from the newest weights."""

    def __init__(self, model: Path, groups: int, members: int, reward: Reward = sorted_reward) -> None:
        self._model = model
        self._groups = groups
        self._members = members
        self._reward = reward
        self._tokenizer = HuggingFaceTokenizer(model, chat=False)
        self._engine = TransformersEngine(model, TransformersEngineOptions())
        self._tasks = tasks("train", 4096, 0)
        self._sampling = SamplingOptions(max_tokens=9, routing=self._engine.info().routing)
        self._step = 0

    async def steps(self, learning_rate: float, count: int, start: Path | None, end: Path) -> list[WeightSnapshot]:
        """Train from the checkpoint `start`, or the model's weights, to the checkpoint `end`: count + 1 versions."""
        options = TrainingOptions(
            algorithm="dppo-binary-tv",
            delta_low=0.15,
            delta_high=0.15,
            divide_by_std=True,
            learning_rate=learning_rate,
            routing_replay=self._sampling.routing,
            publish_dtype="bfloat16",
        )
        trainer = TorchTrainer.from_directory(self._model, options)
        if start is not None:
            trainer.load(start)
        published = [self._snapshot(trainer)]
        for _ in range(count):
            await self._engine.update_weights(published[-1])
            groups = await asyncio.gather(*(self._sample(index, trainer) for index in range(self._groups)))
            self._step += 1
            trainer.train_step(self._step, groups)
            published.append(self._snapshot(trainer))
        await asyncio.to_thread(_save, trainer, end)
        return published

    async def aclose(self) -> None:
        """Stop the engine."""
        await self._engine.aclose()

    def _snapshot(self, trainer: TorchTrainer) -> WeightSnapshot:
        manifest, buffers = trainer.published()
        return WeightSnapshot(PolicyVersion(RUN, 1, self._step, weights_digest(manifest)), 1, manifest, buffers)

    async def _sample(self, index: int, trainer: TorchTrainer) -> TrajectoryGroup:
        number = self._step * self._groups + index
        task = self._tasks[number % len(self._tasks)]
        prompt = np.array(self._tokenizer.encode(task["prompt"]), dtype=np.int32)
        members = tuple(
            TicketMember(f"{number}.{member}", member, 1000 * number + member) for member in range(self._members)
        )
        sampling = self._sampling.params(trainer.stop_token_ids)
        ticket = Ticket(f"{number}", 1, Purpose.TRAIN, number, members, sampling, 30.0)

        async def member_of(member: TicketMember) -> Trajectory:
            recorder = TrajectoryRecorder(ticket, member, prompt, self._engine.info().engine)
            chunks: list[bytes] = []
            close = None
            request = GenerationRequest(member.trajectory_id, prompt, recorder.sampling)
            async for item in self._engine.generate(request):
                if isinstance(item, GenerationEnd):
                    completion = self._tokenizer.decode(recorder.sampled_token_ids)
                    close = recorder.close(item, self._reward(task, completion)).content
                else:
                    chunks.append(recorder.chunk(item).content)
                recorder.written()
            assert isinstance(close, TrajectoryClose)
            record = TrajectoryRecord(member.trajectory_id, member.member, 1, "server-0", close, "", tuple(chunks))
            return assemble_trajectory(record)

        return TrajectoryGroup(f"{number}", number, tuple(await asyncio.gather(*map(member_of, members))))


def _save(trainer: TorchTrainer, directory: Path) -> None:
    directory.mkdir(parents=True)
    trainer.save(directory)


async def real_steps(
    model: Path, rates: Sequence[float], *, groups: int, members: int, first_steps: int, steps: int, reward: Reward
) -> dict[float, list[WeightSnapshot]]:
    """For each learning rate, versions a step apart, all from weights that were trained `first_steps` steps."""
    training = Training(model, groups, members, reward)
    try:
        with tempfile.TemporaryDirectory() as folder:
            trained = None
            if first_steps:
                trained = Path(folder) / "trained"
                await training.steps(5e-4, first_steps, None, trained)
            return {rate: await training.steps(rate, steps, trained, Path(folder) / str(rate)) for rate in rates}
    finally:
        await training.aclose()
