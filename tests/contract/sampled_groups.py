"""Groups sampled by a real engine, through the same recorder, wire form and assembly as in a run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from inference_server.engine import GenerationEnd, GenerationRequest
from inference_server.engines.transformers.engine import TransformersEngine
from inference_server.rollout.trajectory_recorder import TrajectoryRecorder
from learner.training.torch_trainer import TorchTrainer
from leeway.trajectory.assembly import assemble_trajectory
from leeway.types import (
    Float32Array,
    Int32Array,
    PolicyVersion,
    Purpose,
    SamplingParams,
    Ticket,
    TicketMember,
    Trajectory,
    TrajectoryClose,
    TrajectoryGroup,
    TrajectoryRecord,
    WeightSnapshot,
)
from leeway.weights.digests import weights_digest


def snapshot(trainer: TorchTrainer, step: int) -> WeightSnapshot:
    """The trainer's weights as it publishes them."""
    manifest, buffers = trainer.published()
    return WeightSnapshot(PolicyVersion("demo", 1, step, weights_digest(manifest)), 1, manifest, buffers)


async def sample_group(
    engine: TransformersEngine,
    index: int,
    prompt: Int32Array,
    rewards: Sequence[float],
    sampling: SamplingParams,
    on_chunk: Callable[[], object] = lambda: None,
) -> TrajectoryGroup:
    """One member per reward."""
    members = tuple(TicketMember(f"g{index}.{member}", member, 100 * index + member) for member in range(len(rewards)))
    ticket = Ticket(f"g{index}", 1, Purpose.TRAIN, index, members, sampling, 30.0)

    async def sample(member: TicketMember) -> Trajectory:
        recorder = TrajectoryRecorder(ticket, member, prompt, engine.info().engine)
        chunks: list[bytes] = []
        close: TrajectoryClose | None = None
        async for item in engine.generate(GenerationRequest(member.trajectory_id, prompt, recorder.sampling)):
            if isinstance(item, GenerationEnd):
                content = recorder.close(item, rewards[member.member]).content
                assert isinstance(content, TrajectoryClose)
                close = content
            else:
                on_chunk()
                content = recorder.chunk(item).content
                assert isinstance(content, bytes)
                chunks.append(content)
            recorder.written()
        record = TrajectoryRecord(member.trajectory_id, member.member, 1, "server-0", close, "", tuple(chunks))
        return assemble_trajectory(record)

    return TrajectoryGroup(f"g{index}", index, tuple(await asyncio.gather(*map(sample, members))))


def largest_difference(policy: Mapping[str, Float32Array], groups: Sequence[TrajectoryGroup]) -> float:
    """The largest |log pi - log mu| of a trained token."""
    return max(
        float(np.abs(policy[trajectory.trajectory_id] - trajectory.behavior_logprobs[trajectory.loss_mask]).max())
        for group in groups
        for trajectory in group.trajectories
    )


def with_other_experts(groups: Sequence[TrajectoryGroup], experts: int) -> list[TrajectoryGroup]:
    """The same tokens, each routed to the experts after the ones that the engine chose."""
    return [
        replace(
            group,
            trajectories=tuple(
                replace(trajectory, routing=(trajectory.routing + 1) % experts)
                for trajectory in group.trajectories
                if trajectory.routing is not None
            ),
        )
        for group in groups
    ]
