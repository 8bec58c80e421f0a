"""Packed rows beside padded batches: useful tokens per second of whole training steps on long-tailed lengths.

    python -m benchmarks.packing

The trainer itself steps on the same groups in the same order and with the same token budget per micro-batch, in turn:
packed as it plans them; padded, one trajectory per row in order of arrival; and padded after sorting by length, which
only a batch that is there as a whole can do. Nothing else differs, and each step's loss and gradient norm are compared.
A useful token is one of a trajectory, not padding. One thread, medians, CPU time, so that what other programs take of
the machine is not charged to whoever happened to run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from unittest.mock import patch

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from learner.batch.packing import plan_micro_batches
from learner.policy.model import PolicyModel
from learner.training import step_batch
from learner.training.torch_trainer import TorchTrainer
from leeway.config import TrainingOptions
from leeway.types import FinishReason, ModelSignature, Trajectory, TrajectoryGroup

VOCABULARY, CONTEXT, PROMPT, MEMBERS = 4096, 1024, 8, 8
NOW = datetime(2026, 1, 1, tzinfo=UTC)
Plan = Callable[[Sequence[int], int, int], list[list[list[int]]]]


def padded_plan(lengths: Sequence[int], row_tokens: int, micro_batch_tokens: int) -> list[list[list[int]]]:
    """One trajectory per row, in order; a micro-batch is full when its rectangle would exceed the budget."""
    return rectangles(range(len(lengths)), lengths, micro_batch_tokens)


def sorted_plan(lengths: Sequence[int], row_tokens: int, micro_batch_tokens: int) -> list[list[list[int]]]:
    """The same, longest first."""
    return rectangles(sorted(range(len(lengths)), key=lambda index: -lengths[index]), lengths, micro_batch_tokens)


def rectangles(order: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[list[int]]]:
    """Rows of one trajectory, cut into micro-batches."""
    batches: list[list[list[int]]] = []
    width = 0
    for index in order:
        if batches and max(width, lengths[index]) * (len(batches[-1]) + 1) <= budget:
            batches[-1].append([index])
            width = max(width, lengths[index])
        else:
            batches.append([[index]])
            width = lengths[index]
    return batches


PLANS: dict[str, Plan] = {"packed": plan_micro_batches, "padded": padded_plan, "padded, sorted": sorted_plan}


def main() -> int:
    """Run, print a table and the promise; exit 1 if it is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--median", type=float, default=96, help="median length of a trajectory")
    parser.add_argument("--sigma", type=float, default=1.0, help="of the lengths' logarithm")
    parser.add_argument("--budget", type=int, default=4096, help="tokens per micro-batch, padding included")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lengths = long_tailed_lengths(arguments.groups * MEMBERS, arguments.median, arguments.sigma)
    groups = make_groups(lengths)
    trainers = {name: make_trainer(arguments.budget) for name in PLANS}
    seconds: dict[str, list[float]] = {name: [] for name in PLANS}
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in PLANS}
    for number in range(arguments.repeat + 1):  # in turn; the first round warms up
        for name, plan in PLANS.items():
            taken, result = timed_step(trainers[name], plan, number + 1, groups)
            results[name].append(result)
            if number:
                seconds[name].append(taken)
    for name in PLANS:
        np.testing.assert_allclose(results[name], results["packed"], rtol=1e-3, err_msg=f"{name} trains otherwise")
    print_table(lengths, seconds, arguments.budget)
    ratio = statistics.median(seconds["padded"]) / statistics.median(seconds["packed"])
    print(f"\n{'kept' if ratio >= 1.5 else 'NOT kept'}: packed is {ratio:.2f}x padded, at least 1.5x wanted")
    return 0 if ratio >= 1.5 else 1


def timed_step(
    trainer: TorchTrainer, plan: Plan, step: int, groups: Sequence[TrajectoryGroup]
) -> tuple[float, tuple[float, float]]:
    """CPU seconds of one step, and its loss and gradient norm."""
    with patch.object(step_batch, "plan_micro_batches", plan):
        started = time.process_time()
        statistics_of_step = trainer.train_step(step, groups).statistics
        taken = time.process_time() - started
    return taken, (statistics_of_step["loss"], statistics_of_step["grad_norm"])


def print_table(lengths: Sequence[int], seconds: dict[str, list[float]], budget: int) -> None:
    """One row per plan."""
    useful = sum(lengths)
    tail = np.percentile(lengths, [50, 90, 100])
    print(
        f"{len(lengths)} trajectories, {useful} tokens; lengths: median {tail[0]:.0f}, 90% {tail[1]:.0f}, longest "
        f"{tail[2]:.0f}; {budget} tokens per micro-batch; medians of {len(seconds['packed'])} steps\n"
    )
    print(f"{'':<16}{'micro-batches':>14}{'useful tokens':>15}{'CPU s [least, most]':>22}{'useful tokens/s':>17}")
    for name, plan in PLANS.items():
        micro_batches = plan(lengths, 32, budget)
        computed = sum(len(rows) * max(sum(lengths[index] for index in row) for row in rows) for rows in micro_batches)
        taken = statistics.median(seconds[name])
        spread = f"{taken:.2f} [{min(seconds[name]):.2f}, {max(seconds[name]):.2f}]"
        print(f"{name:<16}{len(micro_batches):>14}{useful / computed:>15.0%}{spread:>22}{useful / taken:>17.0f}")


def long_tailed_lengths(count: int, median: float, sigma: float) -> list[int]:
    """Lognormal, cut off at the context."""
    draws = median * np.exp(sigma * np.random.default_rng(0).standard_normal(count))
    return np.clip(draws.round(), PROMPT + 1, CONTEXT).astype(int).tolist()


def make_groups(lengths: Sequence[int]) -> list[TrajectoryGroup]:
    """Trajectories of random tokens, every one with an advantage."""
    rng = np.random.default_rng(1)
    made = [
        Trajectory(
            trajectory_id=str(index),
            member=index % MEMBERS,
            attempt=1,
            server_id="server",
            token_ids=rng.integers(0, VOCABULARY, length).astype(np.int32),
            behavior_logprobs=np.full(length, -np.log(VOCABULARY), dtype=np.float32),
            loss_mask=np.arange(length) >= PROMPT,
            version_spans=(),
            segments=(),
            reward=float(index % 2),
            finish_reason=FinishReason.STOP,
            generation_started_at=NOW,
            generation_finished_at=NOW,
            routing=None,
        )
        for index, length in enumerate(lengths)
    ]
    return [
        TrajectoryGroup(str(first), first, tuple(made[first : first + MEMBERS]))
        for first in range(0, len(made), MEMBERS)
    ]


def make_trainer(budget: int) -> TorchTrainer:
    """A small dense model."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
    )
    policy = PolicyModel(
        Qwen3ForCausalLM(config).float(), routing_replay=False, gradient_checkpointing=False, head="fused"
    )
    signature = ModelSignature(b"model", b"tokenizer", VOCABULARY, 0, 0, 0, CONTEXT)
    return TorchTrainer(policy, signature, TrainingOptions(algorithm="pg-is", micro_batch_tokens=budget))


if __name__ == "__main__":
    sys.exit(main())
