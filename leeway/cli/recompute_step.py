"""`leeway recompute-step RUN STEP`: computes a past step again and compares the result with its receipt."""

from __future__ import annotations

import argparse
import asyncio
import sys

from learner.run_artifacts.checkpoint import CheckpointStore
from learner.run_artifacts.receipts import read_receipts
from learner.run_artifacts.recompute import find_start
from leeway.cli.command import add_run_argument
from leeway.cli.replay_access import open_replay
from leeway.cli.run_folder import RunFolder, open_run_folder
from leeway.cli.serve import on_ranks
from leeway.errors import LeewayError
from leeway.service.children import python_command, running
from leeway.service.process import EXIT_FAILED, EXIT_OK, EXIT_REFUSED

_STOP_SECONDS = 5.0


def declare(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.description = (
        "Recompute a past step: start from the newest kept checkpoint before it, read its groups from the replay "
        "buffer's log, and compare options, data, statistics and weights bit for bit with the step's receipt. It uses "
        "as many ranks as the run did. Bits agree on the same kind of processor with the same libraries and number of "
        "threads; otherwise it names the option that differs. Exit code: "
        "0 equal, 1 different, 2 cannot be recomputed."
    )
    add_run_argument(parser)
    parser.add_argument("step", type=int, metavar="STEP", help="a trained step")
    parser.set_defaults(handler=_recompute_step)


def _recompute_step(arguments: argparse.Namespace) -> int:
    folder = open_run_folder(arguments.run)
    options = folder.configuration.learner
    try:  # what cannot be recomputed is refused before any process starts
        store = CheckpointStore(folder.directory / "checkpoints", keep=options.keep_checkpoints)
        find_start(store, read_receipts(folder.directory), arguments.step)
    except LeewayError as error:
        print(f"leeway: {error.message}", file=sys.stderr)
        return EXIT_REFUSED
    return asyncio.run(_recompute(folder, options.ranks, arguments.step))


async def _recompute(folder: RunFolder, ranks: int, step: int) -> int:
    printed: list[str] = []
    errors: list[str] = []

    def on_line(line: str) -> None:
        printed.append(line.rstrip())
        print(printed[-1], flush=True)

    async with open_replay(folder.config_path) as client:
        process = python_command(
            "learner.recompute_process",
            *("--config", str(folder.config_path), "--set", f"network.replay_buffer={client.address}"),
            *("--directory", str(folder.directory), "--step", str(step), "--supervised"),
        )
        async with running(
            on_ranks(process, ranks), _STOP_SECONDS, on_stdout=on_line, on_stderr=errors.append
        ) as child:
            await child.wait()
    answer = printed[-1] if printed else ""
    if answer.startswith("equal:"):
        return EXIT_OK
    if answer.startswith("different:"):
        return EXIT_FAILED
    print(f"leeway: {_reason(errors)}", file=sys.stderr)
    return EXIT_REFUSED


def _reason(errors: list[str]) -> str:
    """The process's own last error, without torchrun's report on how it ended."""
    lines = [line for line in errors if line.strip()]
    own = [line.removeprefix("recompute-step: ") for line in lines if line.startswith("recompute-step: ")]
    return own[-1] if own else (lines[-1] if lines else "the process ended without a reason")
