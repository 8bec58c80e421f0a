"""`leeway export RUN STEP`: writes a checkpoint as a Hugging Face model."""

from __future__ import annotations

import argparse
from pathlib import Path

from learner.run_artifacts.checkpoint import CheckpointStore
from leeway.cli.command import add_run_argument
from leeway.cli.run_folder import open_run_folder
from leeway.errors import NotFoundError, PreconditionError
from leeway.service.process import EXIT_OK


def declare(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.description = "Write a checkpoint as a Hugging Face directory, which `from_pretrained` loads."
    add_run_argument(parser)
    parser.add_argument("step", type=int, metavar="STEP", help="a step that has a checkpoint; -1 for the newest")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to write (default RUN/export/step-STEP)")
    parser.set_defaults(handler=_export)


def _export(arguments: argparse.Namespace) -> int:
    folder = open_run_folder(arguments.run)
    directory, configuration = folder.directory, folder.configuration
    run, model, options = configuration.run, configuration.model, configuration.learner
    if options.trainer != "torch":
        raise PreconditionError(f"{directory}: its trainer is {options.trainer!r}, which has no model to export")
    store = CheckpointStore(directory / "checkpoints", keep=options.keep_checkpoints)
    checkpoint = store.newest() if arguments.step < 0 else store.load(arguments.step)
    if checkpoint is None:
        raise NotFoundError(f"{directory}: there is no checkpoint yet")
    output: Path = arguments.output or directory / "export" / f"step-{checkpoint.version.step}"
    if output.exists():
        raise PreconditionError(f"{output} exists; remove it or choose another --output")
    from learner.training.torch_trainer import TorchTrainer  # torch takes seconds to import

    trainer = TorchTrainer.from_directory(model.directory, options.training)
    trainer.load(checkpoint.directory)
    trainer.export(model.directory, output)
    print(f"{output}: run {run.name}, step {checkpoint.version.step}")
    return EXIT_OK
