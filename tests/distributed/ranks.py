"""What each rank of the tests does: `torchrun tests/distributed/ranks.py FOLDER`. Rank 0 writes what came out."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from learner.policy.model import PolicyModel
from learner.trainer import UnusableGroupError
from learner.training.torch_trainer import TorchTrainer
from learner.training.world import TorchWorld, World
from leeway.config import TrainingOptions
from leeway.types import TrajectoryGroup
from tests.harness.learner_builders import DENSE, MOE, dense_model, groups, moe_model

STEPS = 4


def options(**changes: Any) -> TrainingOptions:
    values: dict[str, Any] = {
        "learning_rate": 1e-3,
        "epsilon": 1e-6,  # or AdamW's first steps blow the rounding of tiny gradients up to whole steps
        "publish_dtype": "float32",
        "max_gradient_norm": 0.5,  # so that clipping takes part
        "micro_batch_tokens": 32,
        "row_tokens": 16,
        **changes,
    }
    return TrainingOptions.model_validate(values)


CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "dense-length-weights": {"aggregation": "seq-mean-token-mean"},  # a weight for each length
    "dense-batch-aware": {"algorithm": "trm", "delta_low": 0.3, "delta_high": 0.3},
    "dense-proximal": {"algorithm": "minirl", "proximal_every_steps": 2},
    "dense-lora": {"lora": {"rank": 4, "targets": ["q_proj", "v_proj", "down_proj"]}},
    "moe": {"routing_replay": True},
    "moe-balanced": {"routing_replay": True, "load_balancing": 0.1},
    "moe-checkpointing": {"routing_replay": True, "gradient_checkpointing": True},
}
RESUMED = ("dense", "moe")
"""Cases that two ranks continue from what one process saved."""
REFUSE: dict[str, Any] = {"algorithm": "pg-is"}  # without a largest weight


def make(case: str, world: World | None) -> TorchTrainer:
    chosen = options(**CASES.get(case, REFUSE))
    moe = case.startswith("moe")
    policy = PolicyModel(
        moe_model() if moe else dense_model(),
        routing_replay=moe,
        gradient_checkpointing=chosen.gradient_checkpointing,
        head=chosen.head,
        lora=chosen.lora,
        load_balancing=chosen.load_balancing > 0,
    )
    return TorchTrainer(policy, MOE if moe else DENSE, chosen, world=world)


def step_groups(case: str, step: int) -> list[TrajectoryGroup]:
    """Five groups of uneven lengths for two ranks; the last one has equal rewards, so a rank needs fillers."""
    return groups(routing=case.startswith("moe"), seed=step, count=5)


def train(case: str, trainer: TorchTrainer, world: World, steps: Sequence[int], folder: Path | None) -> dict[str, Any]:
    """Train some steps, saving after step 2 while the next are trained; returns the statistics by step."""
    statistics: dict[str, Any] = {}
    finish = None
    for step in steps:
        result = trainer.train_step(step, step_groups(case, step)[world.rank :: world.size])
        statistics[str(step)] = dict(result.statistics)
        if step == steps[-1]:
            statistics["logprobs"] = {name: values.tolist() for name, values in result.policy_logprobs.items()}
        if step == 2 and folder is not None:
            if world.rank == 0:
                folder.mkdir()
            world.gather(np.zeros(1))  # rank 0 has made the folder
            finish = trainer.begin_save(folder)
    if finish is not None:
        finish()
    return statistics


def published(trainer: TorchTrainer) -> dict[str, Any]:
    manifest, buffers = trainer.published()
    return {
        entry.name: np.frombuffer(data, np.float32).reshape(entry.shape)
        for entry, data in zip(manifest.tensors, buffers, strict=True)
    }


def write(folder: Path, case: str, trainer: TorchTrainer, world: World, statistics: dict[str, Any]) -> None:
    tensors = published(trainer)  # every rank takes part
    if world.rank == 0:
        (folder / f"{case}.json").write_text(json.dumps(statistics))
        save_file(tensors, folder / f"{case}.safetensors")


def main() -> None:
    folder = Path(sys.argv[1])
    world = TorchWorld(idle_seconds=300)
    for case in CASES:
        trainer = make(case, world)
        write(folder, case, trainer, world, train(case, trainer, world, range(1, STEPS + 1), folder / f"{case}-saved"))
    for case in RESUMED:
        trainer = make(case, world)
        trainer.load(folder / f"{case}-saved-alone")
        statistics = train(case, trainer, world, range(3, STEPS + 1), None)
        write(folder, f"{case}-resumed", trainer, world, statistics)
    trainer = make("refuse", world)
    messages: list[str] = []
    for step in (spoilt(-120.0, 0.0), spoilt(-80.0, -50.0)):
        try:
            trainer.train_step(1, step[world.rank :: world.size])
        except UnusableGroupError as error:
            messages.append(f"{error.group_id}: {error.message}")
    statistics = train("refuse", trainer, world, range(1, STEPS + 1), None)
    statistics["messages"] = [json.loads(text) for text in world.gather_text(json.dumps(messages))]
    write(folder, "refuse", trainer, world, statistics)
    world.close()


def spoilt(logprob: float, reward: float) -> list[TrajectoryGroup]:
    """Group 1, which rank 1 holds, has a trajectory that the engine calls all but impossible."""
    step = step_groups("refuse", 1)
    members = [*step[1].trajectories]
    logprobs = np.where(members[2].loss_mask, logprob, 0.0).astype(np.float32)
    members[2] = replace(members[2], behavior_logprobs=logprobs, reward=reward)
    step[1] = replace(step[1], trajectories=tuple(members))
    return step


if __name__ == "__main__":
    main()
