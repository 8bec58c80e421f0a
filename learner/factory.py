"""Makes the trainer that a configuration asks for; torch is imported only for a trainer that needs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from learner.trainer import Trainer
from leeway.config import LearnerOptions, ModelOptions
from leeway.errors import ConfigError

if TYPE_CHECKING:
    from learner.training.torch_trainer import TorchTrainer
    from learner.training.world import TorchWorld

_IDLE_MARGIN_SECONDS: Final = 600.0
"""Added to the longest waits of rank 0: opening the run, publishing, evaluations."""


def make_trainer(options: LearnerOptions, model: ModelOptions) -> Trainer:
    """The trainer of a learner in one process, at the run's first weights.

    Raises:
        ConfigError: the model is not whole, or cannot be trained with these options.
    """
    if options.trainer == "arithmetic":
        from learner.arithmetic_trainer import ArithmeticTrainer

        return ArithmeticTrainer()
    import torch

    from learner.training.torch_trainer import TorchTrainer
    from learner.training.world import World, compute_device

    torch.set_num_threads(options.num_threads)
    world = World(compute_device(options.training.device))
    return TorchTrainer.from_directory(model.directory, options.training, world)


def join_world(options: LearnerOptions) -> TorchWorld:
    """The ranks of this learner, which torchrun has started.

    Raises:
        ConfigError: it was not torchrun, or it started another number.
    """
    import torch.distributed as dist

    from learner.training.world import TorchWorld, compute_device

    start = f"torchrun --nproc-per-node {options.ranks} -m learner ..."
    if not dist.is_torchelastic_launched():
        raise ConfigError(f"learner.ranks is {options.ranks}, but this is one process; start it with: {start}")
    idle_seconds = options.draw_timeout_seconds + options.evaluation_timeout_seconds + _IDLE_MARGIN_SECONDS
    world = TorchWorld(idle_seconds, compute_device(options.training.device))
    if world.size != options.ranks:
        raise ConfigError(
            f"learner.ranks is {options.ranks}, but torchrun started {world.size}; start it with: {start}"
        )
    return world


def make_ranked_trainer(options: LearnerOptions, model: ModelOptions, world: TorchWorld) -> TorchTrainer:
    """One rank's trainer, at the run's first weights."""
    import torch

    from learner.training.torch_trainer import TorchTrainer

    torch.set_num_threads(options.num_threads)
    return TorchTrainer.from_directory(model.directory, options.training, world)
