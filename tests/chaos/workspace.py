"""The files, the random configuration and the processes of one run of a chaos suite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from leeway.config import NetworkOptions, RunConfiguration, load_configuration
from tests.chaos.plan import BUFFER, LEARNER, SERVERS, Plan
from tests.chaos.programs import Faults, Program, service
from tests.e2e.rehearsal import EXAMPLE


@dataclass(frozen=True, slots=True)
class Workspace:
    """The files of one run."""

    base: Path
    name: str
    buffer_disk: Path
    archive: Path | None  # of a buffer with retention: what it retired

    @classmethod
    def make(cls, base: Path, name: str, *, own_buffer: bool) -> Workspace:
        """Make the directories; a run without a buffer of its own shares one."""
        number = name.rpartition("-")[2]
        workspace = cls(
            base,
            name,
            base / (f"buffer-{number}" if own_buffer else "buffer"),
            base / "archive" / number if own_buffer else None,
        )
        kept = (workspace.run_directory, workspace.buffer_disk, workspace.archive)
        for directory in (*kept, *(base / folder for folder in ("logs", "ledgers", "controls"))):
            if directory is not None:
                directory.mkdir(parents=True, exist_ok=True)
        return workspace

    @property
    def run_directory(self) -> Path:
        return self.base / "runs" / self.name

    @property
    def config(self) -> Path:
        return self.base / f"{self.name}.toml"

    def log(self, process: str) -> Path:
        return self.base / "logs" / f"{self.name}-{process}.log"

    def controls(self, process: str) -> Path:
        return self.base / "controls" / f"{self.name}-{process}"

    def ledger(self, disk: str) -> Path:
        return self.base / "ledgers" / disk


def services(workspace: Workspace, real: NetworkOptions, plan: Plan) -> list[Program]:
    """The services of a run; `real` is where they listen, the configuration names the proxies."""
    common = ("--config", str(workspace.config), "--supervised")
    arguments = {
        BUFFER: (f"--set=network.replay_buffer={real.replay_buffer}",),
        LEARNER: (f"--set=network.policy={real.policy}",),
        **{name: ("--index", str(index)) for index, name in enumerate(SERVERS)},
    }
    disks = {
        BUFFER: (workspace.buffer_disk, workspace.ledger(workspace.buffer_disk.name)),
        LEARNER: (workspace.run_directory, workspace.ledger(LEARNER)),
    }
    return [
        service(
            name,
            (*common, *own),
            workspace.log(name),
            Faults(
                workspace.controls(name),
                f"{plan.seed}/{workspace.name}",
                *disks.get(name, (None, None)),
                archive=workspace.archive,
                bug=plan.bug if name == plan.bug_process else "",
            ),
        )
        for name, own in arguments.items()
    ]


def configure(plan: Plan, workspace: Workspace, retention: Sequence[str], rng: Random) -> RunConfiguration:
    """A short run, hard to keep up with: small segments, short leases, few workspace."""
    staleness = rng.choice((0, 1, 2, 2))
    overrides = (
        f"run.name={workspace.name}",
        f"run.directory={workspace.base / 'runs'}",
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
        f"replay_buffer.directory={workspace.buffer_disk / 'replay'}",
        "replay_buffer.segment_bytes=1048576",
        "replay_buffer.lease_seconds=1.5",
        "replay_buffer.soft_free_bytes=1",
        "replay_buffer.hard_free_bytes=1",
        "replay_buffer.disk_retry_seconds=0.1",
        "replay_buffer.retry_seconds=0.2",
        *retention,
        "inference_server.worker.prefetch=0",
        "inference_server.worker.ticket_wait_seconds=0.5",
        "inference_server.writer.answer_timeout_seconds=5",
        "inference_server.arithmetic.max_concurrency=4",
        "inference_server.arithmetic.token_seconds=0.004",
        f"inference_server.arithmetic.chunk_tokens={rng.choice((2, 4))}",
        f"learner.checkpoint_every_steps={rng.choice((2, 3, 4))}",
        "learner.evaluation_timeout_seconds=20",
        "learner.draw_timeout_seconds=60",
        "learner.record_policy_logprobs=false",
        *plan.overrides,
    )
    return load_configuration(EXAMPLE, overrides).with_free_ports()


def described(configuration: RunConfiguration, retention: Sequence[str]) -> str:
    """The run's configuration in one line."""
    run = configuration.run
    return (
        f"{run.steps} steps of {run.groups_per_step} x {run.members}, bound {run.max_staleness}, "
        f"a checkpoint every {configuration.learner.checkpoint_every_steps}"
        f"{'' if not retention else f', {retention[0].partition(chr(46))[2]}'}"
    )
