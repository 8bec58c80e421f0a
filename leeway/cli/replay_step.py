"""`leeway replay-step RUN STEP`: computes a past step again and says equal, or where it first differs.

Starts from the newest kept checkpoint before the step, takes the groups from the replay buffer's log, and compares
options, data, statistics and weights bit for bit with the step's receipt, with as many ranks as trained it. Bits agree
on a CPU with as many threads. Exit code 0: equal; 1: different; 2: it could not be computed.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from typing import Any

from learner.records.checkpoint import CheckpointStore
from learner.records.receipts import read_receipts
from learner.records.replay import find_start
from leeway.cli.replay_access import open_replay
from leeway.cli.run_folder import RunFolder, add_run_argument, open_run_folder
from leeway.cli.torchrun import launcher
from leeway.errors import LeewayError
from leeway.service.process import EXIT_FAILED, EXIT_OK, EXIT_REFUSED


def add_parser(subparsers: Any) -> None:  # noqa: ANN401 (argparse names its type privately)
    """Declare the command."""
    parser = subparsers.add_parser(
        "replay-step", help="compute a past step again and compare it, bit for bit", description=__doc__
    )
    add_run_argument(parser)
    parser.add_argument("step", type=int, metavar="STEP", help="a trained step")
    parser.set_defaults(handler=_replay_step)


def _replay_step(arguments: argparse.Namespace) -> int:
    folder = open_run_folder(arguments.run)
    options = folder.configuration.learner
    try:  # what cannot be computed again is refused before any process starts
        store = CheckpointStore(folder.directory / "checkpoints", keep=options.keep_checkpoints)
        find_start(store, read_receipts(folder.directory), arguments.step)
    except LeewayError as error:
        print(f"leeway: {error.message}", file=sys.stderr)
        return EXIT_REFUSED
    return asyncio.run(_replay(folder, options.ranks, arguments.step))


async def _replay(folder: RunFolder, ranks: int, step: int) -> int:
    async with open_replay(folder.config_path) as client:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", *launcher(ranks), "learner.records.replay_process"),
            *("--config", str(folder.config_path), "--set", f"network.replay_buffer={client.address}"),
            *("--directory", str(folder.directory), "--step", str(step), "--supervised"),
            stdin=asyncio.subprocess.PIPE,  # never written; its end tells the process that we are gone
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        errors = asyncio.create_task(process.stderr.read())
        answer = ""
        async for line in process.stdout:
            answer = line.decode("utf-8", "replace").rstrip()
            print(answer, flush=True)
        await process.wait()
    if answer.startswith("equal:"):
        return EXIT_OK
    if answer.startswith("different:"):
        return EXIT_FAILED
    print(f"leeway: {_reason((await errors).decode('utf-8', 'replace'))}", file=sys.stderr)
    return EXIT_REFUSED


def _reason(errors: str) -> str:
    """The process's own last word, without what torchrun says about its end."""
    lines = errors.strip().splitlines()
    own = [line.removeprefix("replay-step: ") for line in lines if line.startswith("replay-step: ")]
    return own[-1] if own else (lines[-1] if lines else "the replay ended without a reason")
