"""`leeway fleet ...`: a run's inference servers."""

from __future__ import annotations

import argparse

from leeway.cli.command import Command, add_commands, add_run_argument, ask_buffer, print_table
from leeway.cli.run_folder import open_run_folder
from leeway.service.process import EXIT_OK
from leeway.types import DrainReason, ServerStatus


def declare(parser: argparse.ArgumentParser) -> None:
    """Describe the group of commands."""
    parser.description = "List, drain and readmit a run's inference servers, whether the run is going or not."
    add_commands(
        parser,
        [
            Command("ls", _list, add_run_argument, "list the servers"),
            Command("drain", _drain, _declare_drain, "take a server out of the run"),
            Command("readmit", _readmit, _declare_server, "let a drained server take part again"),
        ],
    )


def _declare_server(parser: argparse.ArgumentParser) -> None:
    add_run_argument(parser)
    parser.add_argument("server", metavar="SERVER", help="a server that `leeway fleet ls` lists")


def _declare_drain(parser: argparse.ArgumentParser) -> None:
    _declare_server(parser)
    parser.add_argument("--message", default="drained by hand", metavar="TEXT", help="reason for the server and `ls`")
    parser.add_argument("--force", action="store_true", help="drain it even if it is the last active server")


def _list(arguments: argparse.Namespace) -> int:
    """List the servers seen since the replay buffer started, and all drained ones."""
    servers = ask_buffer(open_run_folder(arguments.run), lambda client: client.servers())
    if not servers:
        print("no servers")
        return EXIT_OK
    print_table(
        ("server", "state", "step", "groups", "seconds/group"),
        [
            (
                server.server_id,
                _state(server),
                "" if server.version is None else server.version.step,
                server.tickets,
                f"{server.median_ticket_seconds:.3g}" if server.timed_tickets else "",
            )
            for server in servers
        ],
    )
    for server in servers:
        if server.drained is not None:
            since = f"{server.drained.drained_at:%Y-%m-%d %H:%M:%S}"
            print(f"{server.server_id} is drained since {since} UTC: {server.drained.message}")
    return EXIT_OK


def _state(server: ServerStatus) -> str:
    presence = "active" if server.present else "gone"
    if server.drained is None:
        return presence
    return f"drained ({server.drained.reason.name.lower()}){'' if server.present else ', gone'}"


def _drain(arguments: argparse.Namespace) -> int:
    """Take a server out of the run.

    It finishes the groups it has, gets no more tickets, and is told why. The drain also holds after the buffer or the
    server restarts. The last active server is drained only with --force.
    """
    drained, _ = ask_buffer(
        open_run_folder(arguments.run),
        lambda client: client.drain_server(
            arguments.server, DrainReason.OPERATOR, arguments.message, force=arguments.force
        ),
    )
    print(f"{arguments.server} is drained ({drained.reason.name.lower()}): {drained.message}")
    return EXIT_OK


def _readmit(arguments: argparse.Namespace) -> int:
    """Let a drained server take part again.

    A running server continues at once; one that has ended can be started again. Statistics of its log-prob mismatch
    start from zero.
    """
    readmitted = ask_buffer(open_run_folder(arguments.run), lambda client: client.readmit_server(arguments.server))
    print(f"{arguments.server} {'is readmitted' if readmitted else 'was not drained'}")
    return EXIT_OK
