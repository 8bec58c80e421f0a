"""Makes the trainer that a configuration asks for; torch is imported only for a trainer that needs it."""

from __future__ import annotations

from learner.options import LearnerOptions
from learner.trainer import Trainer
from leeway.config import ModelOptions, SamplingOptions


def make_trainer(options: LearnerOptions, model: ModelOptions, sampling: SamplingOptions) -> Trainer:
    """The trainer of a learner in one process, at the run's first weights.

    Raises:
        ConfigError: the model is not whole, or cannot be trained with these options.
    """
    if options.trainer == "arithmetic":
        from learner.arithmetic_trainer import ArithmeticTrainer

        return ArithmeticTrainer()
    import torch

    from learner.torch_trainer import TorchTrainer

    torch.set_num_threads(options.num_threads)
    return TorchTrainer.from_directory(model.directory, sampling, options.training)
