"""`leeway fleet ...`: the inference servers of a run: who is there, who is drained and why."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from leeway.cli.replay_access import open_replay
from leeway.cli.run_folder import add_run_argument, open_run_folder
from leeway.service.process import EXIT_OK
from leeway.types import Drain, DrainReason, ServerStatus


def add_parser(subparsers: Any) -> None:  # noqa: ANN401 (argparse names its type privately)
    """Declare the group of commands."""
    parser = subparsers.add_parser("fleet", help="look after a run's inference servers", description=__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add(
        commands,
        _list,
        "ls",
        "list the servers",
        "Those heard of since the buffer started, and those that are drained.",
    )
    drain = _add_named(
        commands,
        _drain,
        "drain",
        "take a server out of the run",
        "It gets no more work and is told why; it finishes what it holds. The last server at work stays unless forced. "
        "Durable: also when buffer or server are started again.",
    )
    drain.add_argument("--message", default="drained by hand", metavar="TEXT", help="told to the server, and listed")
    drain.add_argument("--force", action="store_true", help="also the last server at work")
    _add_named(
        commands,
        _readmit,
        "readmit",
        "let a drained server work again",
        "One that is running goes on at once; one that has ended may be started again. Its mismatch is judged afresh.",
    )


def _add(commands: Any, handler: Any, name: str, summary: str, description: str) -> argparse.ArgumentParser:  # noqa: ANN401
    parser = commands.add_parser(name, help=summary, description=description)
    add_run_argument(parser)
    parser.set_defaults(handler=handler)
    return parser


def _add_named(commands: Any, handler: Any, name: str, summary: str, description: str) -> argparse.ArgumentParser:  # noqa: ANN401
    parser = _add(commands, handler, name, summary, description)
    parser.add_argument("server", metavar="SERVER", help="a server that `leeway fleet ls` lists")
    return parser


def _list(arguments: argparse.Namespace) -> int:
    config_path = open_run_folder(arguments.run).config_path

    async def fetch() -> Sequence[ServerStatus]:
        async with open_replay(config_path) as client:
            return await client.servers()

    servers = asyncio.run(fetch())
    if not servers:
        print("no servers")
        return EXIT_OK
    table = Table("server", "state", "step", "groups", "a group takes", box=None, pad_edge=False)
    for server in servers:
        table.add_row(
            server.server_id,
            _state(server),
            "" if server.version is None else str(server.version.step),
            str(server.loans),
            f"{server.median_loan_seconds:.3g} s" if server.timed_loans else "",
        )
    Console(highlight=False, markup=False).print(table)
    for server in servers:
        if server.drained is not None:
            since = f"{server.drained.drained_at:%Y-%m-%d %H:%M:%S}"
            print(f"{server.server_id} is drained since {since} UTC: {server.drained.message}")
    return EXIT_OK


def _state(server: ServerStatus) -> str:
    presence = "at work" if server.present else "gone"
    if server.drained is None:
        return presence
    return f"drained ({server.drained.reason.name.lower()}){'' if server.present else ', gone'}"


def _drain(arguments: argparse.Namespace) -> int:
    config_path = open_run_folder(arguments.run).config_path

    async def drain() -> Drain:
        async with open_replay(config_path) as client:
            reason = DrainReason.OPERATOR
            drained, _ = await client.drain_server(arguments.server, reason, arguments.message, force=arguments.force)
            return drained

    drained = asyncio.run(drain())
    print(f"{arguments.server} is drained ({drained.reason.name.lower()}): {drained.message}")
    return EXIT_OK


def _readmit(arguments: argparse.Namespace) -> int:
    config_path = open_run_folder(arguments.run).config_path

    async def readmit() -> bool:
        async with open_replay(config_path) as client:
            return await client.readmit_server(arguments.server)

    readmitted = asyncio.run(readmit())
    print(f"{arguments.server} {'gets work again' if readmitted else 'was not drained'}")
    return EXIT_OK
