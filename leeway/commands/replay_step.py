"""`leeway replay-step RUN STEP`: computes a past step again and says equal, or where it first differs.

Starts from the newest kept checkpoint before the step, takes the groups from the replay buffer's log, and compares
options, data, statistics and weights bit for bit with the step's receipt. Bits agree on a CPU with as many threads.
Exit code 0: equal; 1: different.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from learner.checkpoint import CheckpointStore
from learner.making import make_trainer
from learner.options import LearnerOptions
from learner.receipts import deciding_options, read_receipts
from learner.replay import Difference, find_start, replay
from leeway.commands.replay_access import open_replay
from leeway.commands.run_folder import load_run_document
from leeway.config import Document, ModelOptions, RunOptions, SamplingOptions, section
from leeway.errors import PreconditionError
from leeway.process import EXIT_FAILED, EXIT_OK
from leeway.types import GroupRecord, Purpose


def add_parser(subparsers: Any) -> None:  # noqa: ANN401 (argparse names its type privately)
    """Declare the command."""
    parser = subparsers.add_parser(
        "replay-step", help="compute a past step again and compare it, bit for bit", description=__doc__
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder, such as runs/sortmix8")
    parser.add_argument("step", type=int, metavar="STEP", help="a trained step")
    parser.set_defaults(handler=_replay_step)


def _replay_step(arguments: argparse.Namespace) -> int:
    difference = asyncio.run(_replay(arguments.run, arguments.step, load_run_document(arguments.run)))
    if difference is None:
        print(f"equal: step {arguments.step} gives the same statistics and weights, bit for bit")
        return EXIT_OK
    print(f"different: {difference}")
    return EXIT_FAILED


async def _replay(directory: Path, step: int, document: Document) -> Difference | None:
    options = section(document, "learner", LearnerOptions)
    run = section(document, "run", RunOptions)
    if options.ranks > 1:
        raise PreconditionError(
            f"{directory} was trained by {options.ranks} ranks; their sums have another order than one process's, "
            "so its steps cannot be computed again to the bit"
        )
    receipts = read_receipts(directory)
    store = CheckpointStore(directory / "checkpoints", keep=options.keep_checkpoints)
    checkpoint = find_start(store, receipts, step)
    trainer = make_trainer(
        options, section(document, "model", ModelOptions), section(document, "sampling", SamplingOptions)
    )
    print(f"starting from the checkpoint of step {checkpoint.version.step}")
    async with open_replay(document) as client:

        def export_step(at: int) -> AsyncIterator[GroupRecord]:
            return client.export_groups(purpose=Purpose.TRAIN, step=at)

        return await replay(
            trainer,
            checkpoint,
            receipts,
            step,
            deciding_options(options, trainer.signature, seed=run.seed),
            export_step,
            print,
        )
