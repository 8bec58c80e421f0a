"""One learner as several ranks: FSDP2 under torchrun.

    rank 0       the loop: draws, checks and trains; draws the whole batch and trains groups 0, W, 2W, ...
      │ commands: train, publish, save, load, stop
      ▼
    rank r > 0   follows: draws its slice r, r + W, ... of the same step, trains; takes part in what needs every shard

    waits for    a command (rank 0 is idle while it waits for groups)
    unblocks     nobody: every rank meets in the collectives of the command
    ends         at `stop`; when a rank dies, torchrun ends the others

Only rank 0 advances, commits and publishes. A group that cannot be trained on is found by rank 0, which checks the
whole batch, before anybody is told; what shows only in the middle of a step is agreed on by all ranks.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from learner.lineage import Branch
from learner.trainer import FinishSave, StepResult, UnusableGroupError
from learner.training.torch_trainer import TorchTrainer
from learner.training.world import TorchWorld
from leeway.errors import InvalidDataError
from leeway.types import ModelSignature, TrajectoryGroup, WeightManifest

log = logging.getLogger(__name__)


class DistributedTrainer:
    """Rank 0's trainer: has the others do what it does. Implements `learner.trainer.Trainer`."""

    def __init__(self, trainer: TorchTrainer, world: TorchWorld) -> None:
        """Lead the other ranks."""
        self._trainer = trainer
        self._world = world

    @property
    def signature(self) -> ModelSignature:
        return self._trainer.signature

    @property
    def numerics(self) -> Mapping[str, str]:
        return self._trainer.numerics

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        return self._trainer.stop_token_ids

    def published(self) -> tuple[WeightManifest, list[bytes]]:
        self._world.send({"do": "publish"})
        return self._trainer.published()

    def train_step(self, step: int, groups: Sequence[TrajectoryGroup], branches: Sequence[Branch] = ()) -> StepResult:
        self._trainer.check(step, groups)
        self._world.send({"do": "train", "step": step, "branches": list(branches)})
        return self._trainer.train_step(step, groups[:: self._world.size], branches)

    def begin_save(self, directory: Path) -> FinishSave:
        self._world.send({"do": "save", "directory": str(directory)})
        return self._trainer.begin_save(directory)

    def save(self, directory: Path) -> None:
        self.begin_save(directory)()

    def load(self, directory: Path) -> None:
        self._world.send({"do": "load", "directory": str(directory)})
        self._trainer.load(directory)

    def stop(self) -> None:
        """Let the others go."""
        self._world.send({"do": "stop"})


StepGroups = Callable[[int, Sequence[Branch]], Awaitable[Sequence[TrajectoryGroup]]]
"""(step, branches of the surviving history) -> this rank's slice of the step: groups r, r + W, ..."""


async def follow(trainer: TorchTrainer, world: TorchWorld, my_groups: StepGroups) -> None:
    """Do what rank 0 says until it says stop; `my_groups` gives what to train on.

    Raises:
        LeewayError: this rank cannot go on; the learner starts again as a whole.
    """
    finish_save: FinishSave | None = None
    while True:
        command = await asyncio.to_thread(world.receive)
        match command["do"]:
            case "train":
                step, branches = command["step"], [(epoch, start) for epoch, start in command["branches"]]
                groups = await my_groups(step, branches)
                try:
                    await asyncio.to_thread(trainer.train_step, step, groups, branches)
                except UnusableGroupError as error:
                    log.info("rank %d: step %d is drawn again: %s", world.rank, step, error.message)
            case "publish":
                await asyncio.to_thread(trainer.published)
            case "save":
                if finish_save is not None:
                    await asyncio.to_thread(finish_save)
                finish_save = await asyncio.to_thread(trainer.begin_save, Path(command["directory"]))
            case "load":
                await asyncio.to_thread(trainer.load, Path(command["directory"]))
            case "stop":
                if finish_save is not None:
                    await asyncio.to_thread(finish_save)
                return
            case unknown:
                raise InvalidDataError(f"rank {world.rank}: rank 0 sent the unknown command {unknown!r}")
