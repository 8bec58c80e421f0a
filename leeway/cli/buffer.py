"""`leeway buffer ...`: look after the replay buffer of a run, whether the run is going or not."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from learner.records.checkpoint import CheckpointStore
from learner.records.journal import read_journal
from learner.records.run_lock import held_run
from learner.records.summary import summarize, write_summary
from leeway.cli import buffer_files
from leeway.cli.replay_access import open_replay
from leeway.cli.run_folder import add_run_argument, has_finished, open_run_folder
from leeway.errors import PreconditionError, UnavailableError
from leeway.service.process import EXIT_OK
from leeway.types import DeadLetter, PolicyVersion, RunStatus


def add_parser(subparsers: Any) -> None:  # noqa: ANN401 (argparse names its type privately)
    """Declare the group of commands."""
    parser = subparsers.add_parser("buffer", help="look after a run's replay buffer", description=__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (_add_rollback, _add_finish, _add_dead_letters, _add_requeue, _add_backup, buffer_files.add_commands):
        add(commands)


def _command(commands: Any, name: str, summary: str, description: str) -> argparse.ArgumentParser:  # noqa: ANN401
    parser = commands.add_parser(name, help=summary, description=description)
    add_run_argument(parser)
    return parser


# leeway buffer rollback


def _add_rollback(commands: Any) -> None:  # noqa: ANN401
    parser = _command(
        commands,
        "rollback",
        "return a run to an older checkpoint",
        "Discards every step after STEP and what later versions sampled (drop reason rolled_back); their tasks are "
        "issued again. A learner that is running is fenced, and goes on from the checkpoint of STEP when it starts "
        "again. There is no way back.",
    )
    parser.add_argument("step", type=int, metavar="STEP", help="a step that has a checkpoint")
    parser.set_defaults(handler=_rollback)


def _rollback(arguments: argparse.Namespace) -> int:
    folder = open_run_folder(arguments.run)
    store = CheckpointStore(folder.directory / "checkpoints", keep=folder.configuration.learner.keep_checkpoints)
    version = store.load(arguments.step).version

    async def roll_back() -> tuple[int, int]:
        async with open_replay(folder.config_path) as client:
            return await client.rollback_run(version)

    epoch, dropped = asyncio.run(roll_back())
    print(f"rolled back to {_named(version)}: {dropped} groups are dropped, learners below epoch {epoch} are fenced")
    return EXIT_OK


def _named(version: PolicyVersion) -> str:
    return f"step {version.step} ({version})"


# leeway buffer finish


def _add_finish(commands: Any) -> None:  # noqa: ANN401
    parser = _command(
        commands,
        "finish",
        "end a run for good that nobody will continue",
        "Drops every group that has not ended (drop reason run_end), those of steps included that are trained but not "
        "committed, so that retention can let the run's segments go. What has ended stays as long as retention keeps "
        "it, and no checkpoint is touched. Servers are told and end. A learner at work in the run's folder is left "
        "alone unless --force is given; one on another host cannot be seen. Whichever learner calls next is told that "
        "the run was ended, and ends with that line. There is no way back.",
    )
    parser.add_argument("--force", action="store_true", help="also when a learner is at work on the run")
    parser.set_defaults(handler=_finish)


def _finish(arguments: argparse.Namespace) -> int:
    folder = open_run_folder(arguments.run)

    async def finish() -> None:
        async with open_replay(folder.config_path) as client:
            status = await client.run_status()
            if status.finished:
                print(f"run {status.spec.run!r} has ended before, {_at_step(status)}; nothing is changed")
            else:
                with _no_learner(folder.directory, force=arguments.force):
                    print(_what_finish_does(status), flush=True)
                    dropped = await client.give_up_run()
                print(
                    f"run {status.spec.run!r} is ended for good: {dropped} groups are dropped, evaluations included; "
                    f"{status.consumed} consumed and {sum(status.dropped.values())} dropped before stay as long as "
                    "retention keeps them"
                )
                status = await client.run_status()
            _note_the_end(folder.directory, status)

    asyncio.run(finish())
    return EXIT_OK


@contextmanager
def _no_learner(directory: Path, *, force: bool) -> Generator[None]:
    """Keep learners out of the run's folder meanwhile.

    Raises:
        PreconditionError: one is at work in it.
    """
    with ExitStack() as stack:
        if directory.is_dir() and not force:
            try:
                stack.enter_context(held_run(directory))
            except UnavailableError as error:
                raise PreconditionError(f"{error.message}; to end the run under it, give --force") from error
        yield


def _at_step(status: RunStatus) -> str:
    return f"at step {status.head.step} of {status.spec.total_steps}"


def _what_finish_does(status: RunStatus) -> str:
    first, last = status.committed_step + 1, status.head.step
    steps = f"step {last}, which is" if first == last else f"steps {first} to {last}, which are"
    among = f", with those of {steps} trained but not committed" if first <= last else ""
    return (
        f"run {status.spec.run!r} is {_at_step(status)}: {status.open} open, {status.ready} ready and {status.drawn} "
        f"drawn groups are to be dropped (run_end){among}"
    )


def _note_the_end(directory: Path, status: RunStatus) -> None:
    """Leave in the run's folder what its learner would have left at its end, so that nobody is told to resume it."""
    records = read_journal(directory / "metrics.jsonl")
    if records and not has_finished(directory):
        write_summary(directory, summarize(records, status, ()))


# leeway buffer dead-letters, leeway buffer requeue


def _add_dead_letters(commands: Any) -> None:  # noqa: ANN401
    parser = _command(
        commands,
        "dead-letters",
        "list groups that were set aside",
        "Groups that were dropped as dead_letter, failed, invalid, conflict or unknown_version, and whose tasks nobody "
        "has queued again.",
    )
    parser.add_argument("--limit", type=int, default=20, metavar="N", help="newest to show (default 20; 0: all)")
    parser.set_defaults(handler=_dead_letters)


def _dead_letters(arguments: argparse.Namespace) -> int:
    config_path = open_run_folder(arguments.run).config_path

    async def fetch() -> Sequence[DeadLetter]:
        async with open_replay(config_path) as client:
            return await client.dead_letters(arguments.limit)

    letters = asyncio.run(fetch())
    if not letters:
        print("no dead letters")
        return EXIT_OK
    table = Table("group", "task", "reason", "tries", "server", "what happened", box=None, pad_edge=False)
    for letter in letters:
        table.add_row(
            letter.group_id,
            str(letter.task_index),
            letter.reason.name.lower(),
            str(letter.attempts),
            letter.server_id,
            letter.message,
        )
    Console(highlight=False, markup=False).print(table)
    return EXIT_OK


def _add_requeue(commands: Any) -> None:  # noqa: ANN401
    parser = _command(
        commands,
        "requeue",
        "issue the tasks of dead letters again",
        "Each task comes again as a new group with all its tries; the group that was set aside stays dropped.",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("groups", nargs="*", default=[], metavar="GROUP", help="a group that `dead-letters` lists")
    which.add_argument("--all", action="store_true", help="every dead letter")
    parser.set_defaults(handler=_requeue)


def _requeue(arguments: argparse.Namespace) -> int:
    config_path = open_run_folder(arguments.run).config_path

    async def requeue() -> int:
        async with open_replay(config_path) as client:
            return await client.requeue_dead_letters([] if arguments.all else arguments.groups)

    print(f"{asyncio.run(requeue())} tasks are queued again")
    return EXIT_OK


# leeway buffer backup


def _add_backup(commands: Any) -> None:  # noqa: ANN401
    parser = _command(
        commands,
        "backup",
        "copy the log to a new folder, while the run goes on",
        "The copy is consistent and can be opened in the original's place ([replay_buffer] directory). It is a log of "
        "its own then: every learner and every loan from before is fenced, and a learner's checkpoint that it does not "
        "know is refused. Sealed segments are hard links on the same disk.",
    )
    parser.add_argument(
        "target", type=Path, metavar="DIR", help="a folder on the buffer's host that does not exist yet"
    )
    parser.set_defaults(handler=_backup)


def _backup(arguments: argparse.Namespace) -> int:
    config_path = open_run_folder(arguments.run).config_path
    target: Path = arguments.target.resolve()

    async def back_up() -> int:
        async with open_replay(config_path) as client:
            return await client.back_up(str(target))

    print(f"{target}: {asyncio.run(back_up()) >> 20} MiB of log")
    return EXIT_OK
