"""How the commands of `leeway` are declared, and the arguments that several of them take."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.table import Table

from leeway.cli.replay_access import open_replay
from leeway.cli.run_folder import RunFolder
from leeway.replay_client import ReplayClient
from leeway.rpc import Security

Declare = Callable[[argparse.ArgumentParser], None]
Handler = Callable[[argparse.Namespace], int]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Command:
    """One command of a group such as `leeway buffer`.

    Args:
        name: what is typed.
        handler: runs it and returns the exit code; its docstring is the command's help.
        declare: adds its arguments.
        summary: a phrase for the list of commands.
    """

    name: str
    handler: Handler
    declare: Declare
    summary: str


def add_commands(parser: argparse.ArgumentParser, commands: Sequence[Command]) -> None:
    """Declare a group's commands."""
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in commands:
        subparser = subparsers.add_parser(command.name, help=command.summary, description=command.handler.__doc__)
        command.declare(subparser)
        subparser.set_defaults(handler=command.handler)


def add_run_argument(parser: argparse.ArgumentParser) -> None:
    """Declare RUN."""
    parser.add_argument(
        "run",
        type=Path,
        metavar="RUN",
        help="the run's folder, such as runs/sortmix8; or, for services started by hand, their configuration file",
    )


def add_security_options(parser: argparse.ArgumentParser) -> None:
    """Declare the three files of mutual TLS."""
    for name in ("certificate", "key", "authority"):
        parser.add_argument(f"--{name}", type=Path, metavar="PEM", help="for mutual TLS; give all three")


def security_of(arguments: argparse.Namespace) -> Security:
    """The certificates that `add_security_options` declared."""
    return Security.from_files(arguments.certificate, arguments.key, arguments.authority, insecure=True)


def print_table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; its lines are kept whole where the output is not a terminal."""
    table = Table(*headers, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(str, row))
    width = None if sys.stdout.isatty() else 200
    Console(highlight=False, markup=False, soft_wrap=True, width=width).print(table)


def ask_buffer(folder: RunFolder, question: Callable[[ReplayClient], Awaitable[T]]) -> T:
    """The answer of the run's replay buffer, which is started for it where it does not run."""

    async def ask() -> T:
        async with open_replay(folder.config_path) as client:
            return await question(client)

    return asyncio.run(ask())
