"""`leeway buffer ...`: a run's replay buffer, whether the run is going or not."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from learner.run_artifacts.checkpoint import CheckpointStore
from learner.run_artifacts.journal import read_journal, summarize, write_summary
from learner.run_artifacts.run_lock import held_run
from leeway.cli import buffer_files
from leeway.cli.command import Command, add_commands, add_run_argument, ask_buffer, print_table
from leeway.cli.replay_access import open_replay
from leeway.cli.run_folder import RunFolder, has_finished, open_run_folder
from leeway.errors import PreconditionError, UnavailableError
from leeway.service.process import EXIT_OK
from leeway.types import RunStatus


def declare(parser: argparse.ArgumentParser) -> None:
    """Describe the group of commands."""
    parser.description = "Inspect and manage a run's replay buffer, whether the run is going or not."
    add_commands(parser, [*_COMMANDS, *buffer_files.COMMANDS])


# leeway buffer rollback


def _declare_rollback(parser: argparse.ArgumentParser) -> None:
    add_run_argument(parser)
    parser.add_argument("step", type=int, metavar="STEP", help="a step that has a checkpoint")


def _rollback(arguments: argparse.Namespace) -> int:
    """Return a run to an older checkpoint.

    Every step after STEP and all that later versions sampled is discarded (drop reason rolled_back), and their tasks
    are issued again. A running learner is fenced, and continues from the checkpoint of STEP when it restarts. This
    cannot be undone.
    """
    folder = open_run_folder(arguments.run)
    store = CheckpointStore(folder.directory / "checkpoints", keep=folder.configuration.learner.keep_checkpoints)
    version = store.load(arguments.step).version
    epoch, dropped = ask_buffer(folder, lambda client: client.rollback_run(version))
    print(
        f"rolled back to step {version.step} ({version}): {dropped} groups are dropped, learners below epoch {epoch} "
        "are fenced"
    )
    return EXIT_OK


# leeway buffer finish


def _declare_finish(parser: argparse.ArgumentParser) -> None:
    add_run_argument(parser)
    parser.add_argument("--force", action="store_true", help="finish the run even while a learner is training it")


def _finish(arguments: argparse.Namespace) -> int:
    """Finish a run that will not be continued, so that retention can delete its log.

    Every group that has not ended is dropped (drop reason run_end), also those of steps that are trained but not
    committed. What has ended and the checkpoints stay. The servers end. A learner that still runs ends with its next
    call to the buffer; without --force the command refuses while one is training in the run's folder on this host.
    This cannot be undone.
    """
    asyncio.run(_finish_run(open_run_folder(arguments.run), force=arguments.force))
    return EXIT_OK


async def _finish_run(folder: RunFolder, *, force: bool) -> None:
    async with open_replay(folder.config_path) as client:
        status = await client.run_status()
        if status.finished:
            print(f"run {status.spec.run!r}: already finished {_at_step(status)}; nothing to do")
        else:
            with _no_learner(folder.directory, force=force):
                print(_plan_of_finish(status), flush=True)
                dropped = await client.give_up_run()
            print(
                f"run {status.spec.run!r} is finished: {dropped} groups are dropped, evaluations included; "
                f"{status.consumed} consumed and {sum(status.dropped.values())} dropped before stay as long as "
                "retention keeps them"
            )
            status = await client.run_status()
        _note_the_end(folder.directory, status)


@contextmanager
def _no_learner(directory: Path, *, force: bool) -> Generator[None]:
    """Keep learners out of the run's folder for the length of the block.

    Raises:
        PreconditionError: a learner is training the run.
    """
    with ExitStack() as stack:
        if directory.is_dir() and not force:
            try:
                stack.enter_context(held_run(directory))
            except UnavailableError as error:
                raise PreconditionError(f"{error.message}; to finish the run nevertheless, give --force") from error
        yield


def _at_step(status: RunStatus) -> str:
    return f"at step {status.head.step} of {status.spec.total_steps}"


def _plan_of_finish(status: RunStatus) -> str:
    first, last = status.committed_step + 1, status.head.step
    steps = f"step {last}, which is" if first == last else f"steps {first} to {last}, which are"
    among = f", including those of {steps} trained but not committed" if first <= last else ""
    return (
        f"run {status.spec.run!r} is {_at_step(status)}: dropping {status.open} open, {status.ready} ready and "
        f"{status.drawn} drawn groups (run_end){among}"
    )


def _note_the_end(directory: Path, status: RunStatus) -> None:
    """Write the summary that the run's learner would have written at its end, so that nobody is told to resume it."""
    records = read_journal(directory / "metrics.jsonl")
    if records and not has_finished(directory):
        write_summary(directory, summarize(records, status, ()))


# leeway buffer dead-letters, leeway buffer requeue


def _declare_dead_letters(parser: argparse.ArgumentParser) -> None:
    add_run_argument(parser)
    parser.add_argument("--limit", type=int, default=20, metavar="N", help="newest to show (default 20; 0: all)")


def _dead_letters(arguments: argparse.Namespace) -> int:
    """List the groups that were dropped as dead_letter, failed, invalid, conflict or unknown_version.

    Those whose tasks have been queued again are left out.
    """
    letters = ask_buffer(open_run_folder(arguments.run), lambda client: client.dead_letters(arguments.limit))
    if not letters:
        print("no dead letters")
        return EXIT_OK
    print_table(
        ("group", "task", "reason", "attempts", "server", "what happened"),
        [
            (each.group_id, each.task_index, each.reason.name.lower(), each.attempts, each.server_id, each.message)
            for each in letters
        ],
    )
    return EXIT_OK


def _declare_requeue(parser: argparse.ArgumentParser) -> None:
    add_run_argument(parser)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("groups", nargs="*", default=[], metavar="GROUP", help="a group that `dead-letters` lists")
    which.add_argument("--all", action="store_true", help="every dead letter")


def _requeue(arguments: argparse.Namespace) -> int:
    """Issue the tasks of dead letters again.

    Each comes as a new group with all its attempts. Old groups stay dropped.
    """
    groups: list[str] = [] if arguments.all else arguments.groups
    requeued = ask_buffer(open_run_folder(arguments.run), lambda client: client.requeue_dead_letters(groups))
    print(f"{requeued} tasks are queued again")
    return EXIT_OK


# leeway buffer backup


def _declare_backup(parser: argparse.ArgumentParser) -> None:
    add_run_argument(parser)
    parser.add_argument("target", type=Path, metavar="DIR", help="a new folder on the buffer's host")


def _backup(arguments: argparse.Namespace) -> int:
    """Copy the log to a new folder while the run goes on.

    The copy is consistent and can be opened in place of the original ([replay_buffer] directory). It is then a separate
    log: learners and leases from before are fenced, and a checkpoint that it does not know is refused. On the same
    disk, sealed segments are hard links.
    """
    target: Path = arguments.target.resolve()
    size_bytes = ask_buffer(open_run_folder(arguments.run), lambda client: client.back_up(str(target)))
    print(f"{target}: {size_bytes >> 20} MiB of log")
    return EXIT_OK


_COMMANDS = [
    Command("rollback", _rollback, _declare_rollback, "return a run to an older checkpoint"),
    Command("finish", _finish, _declare_finish, "finish a run that will not be continued"),
    Command("dead-letters", _dead_letters, _declare_dead_letters, "list groups that were set aside"),
    Command("requeue", _requeue, _declare_requeue, "issue the tasks of dead letters again"),
    Command("backup", _backup, _declare_backup, "copy the log to a new folder while the run goes on"),
]
