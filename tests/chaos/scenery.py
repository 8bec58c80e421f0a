"""The configuration of one run of a chaos suite, drawn by lot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random

from leeway.commands.configuration import RunConfiguration, read_configuration, with_free_ports
from leeway.config import load_document
from tests.chaos.plan import Plan
from tests.e2e.rehearsal import EXAMPLE


def configure(
    plan: Plan, base: Path, name: str, buffer_disk: Path, retention: Sequence[str], rng: Random
) -> RunConfiguration:
    """A short run, hard to keep up with: small segments, short leases, few places."""
    staleness = rng.choice((0, 1, 2, 2))
    overrides = (
        f"run.name={name}",
        f"run.directory={base / 'runs'}",
        f"run.steps={plan.steps}",
        f"run.seed={rng.randrange(1000)}",
        f"run.groups_per_step={rng.choice((2, 3))}",
        f"run.members={rng.choice((1, 2))}",
        f"run.max_staleness={staleness}",
        "run.max_attempts=20",
        "task.train_count=64",
        "task.heldout_count=4",
        "sampling.max_tokens=16",
        f"evaluation.every_steps={rng.choice((0, 5))}",
        "evaluation.tasks=2",
        "evaluation.members=1",
        "network.weights=grpc",
        f"replay_buffer.directory={buffer_disk / 'replay'}",
        "replay_buffer.segment_bytes=1048576",
        "replay_buffer.lease_seconds=1.5",
        "replay_buffer.soft_free_bytes=1",
        "replay_buffer.hard_free_bytes=1",
        "replay_buffer.disk_retry_seconds=0.1",
        "replay_buffer.retry_seconds=0.2",
        *retention,
        "inference_server.prefetch=0",
        "inference_server.ticket_wait_seconds=0.5",
        "inference_server.answer_timeout_seconds=5",
        "inference_server.arithmetic.max_concurrency=4",
        "inference_server.arithmetic.token_seconds=0.004",
        f"inference_server.arithmetic.chunk_tokens={rng.choice((2, 4))}",
        f"learner.checkpoint_every_steps={rng.choice((2, 3, 4))}",
        "learner.evaluation_timeout_seconds=20",
        "learner.draw_timeout_seconds=60",
        "learner.record_policy_logprobs=false",
        *plan.overrides,
    )
    return with_free_ports(read_configuration(load_document(EXAMPLE, overrides)))


def described(configuration: RunConfiguration, retention: Sequence[str]) -> str:
    """One line for people."""
    run = configuration.run
    return (
        f"{run.steps} steps of {run.groups_per_step} x {run.members}, bound {run.max_staleness}, "
        f"a checkpoint every {configuration.learner.checkpoint_every_steps}"
        f"{'' if not retention else f', {retention[0].partition(chr(46))[2]}'}"
    )
