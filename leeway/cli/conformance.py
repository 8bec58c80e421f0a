"""`leeway conformance ADDRESS`: tests a server against the inference contract."""

from __future__ import annotations

import argparse
import asyncio
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from leeway.cli.command import add_security_options, security_of
from leeway.conformance import kit
from leeway.conformance.client import BackendClient, Refused
from leeway.conformance.kit import exit_code, junit, printable
from leeway.conformance.own_server import Starter, started
from leeway.conformance.requirement import Result, Status
from leeway.conformance.session import KitOptions, Session
from leeway.conformance.weights import arithmetic_weights, checkpoint_weights, is_arithmetic
from leeway.errors import ConfigError, InvalidDataError, UnavailableError
from leeway.rpc import Security

_STYLES: Final = {Status.PASSED: "green", Status.FAILED: "bold red", Status.SKIPPED: "yellow", Status.NOT_RUN: "dim"}
_NARROWEST_TABLE: Final = 160
_ANSWER_SECONDS: Final = 20.0


# Options whose defaults are the kit's own: flag, field of KitOptions, metavar, help.
_NUMBERS: Final = (
    ("--samples", "samples", "N", "samples per test of frequencies; some tests take more"),
    ("--tolerance", "tolerance", "NATS", "largest difference of a log-prob that is sampled again"),
    ("--quiet-seconds", "quiet_seconds", "S", "how long no token may come while paused"),
    ("--start-seconds", "start_seconds", "S", "longest start of a server that --command starts"),
    ("--stop-seconds", "stop_seconds", "S", "longest clean stop"),
    ("--timeout", "check_seconds", "S", "deadline of each requirement"),
)


def declare(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.description = (
        "Test a server against every requirement of docs/conformance.md: one that runs at ADDRESS, or one that "
        "--command starts. The test pushes weights and pauses decoding, so never use a server that feeds a run. "
        "Weights come from --weights; a server that samples by the arithmetic law needs none. Exit code: 0 all passed "
        "or skipped, 1 a requirement failed, 2 the server cannot be tested."
    )
    parser.add_argument("address", nargs="?", metavar="ADDRESS", help="host:port of an InferenceService")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="Hugging Face directory of the served model")
    parser.add_argument(
        "--command",
        metavar="COMMAND",
        help="starts a server that listens at {address}, which the kit fills in; needed for STOP-1 and STOP-2, and "
        "used for everything when no ADDRESS is given",
    )
    parser.add_argument("--junit", type=Path, metavar="FILE", help="also write the results as JUnit XML")
    parser.add_argument("--run", metavar="NAME", help="run of the pushed versions (default: that of the served)")
    parser.add_argument(
        "--context-length",
        type=int,
        metavar="N",
        help="longest sequence, if shorter than the model's",
    )
    for flag, field, metavar, text in _NUMBERS:
        default: int | float = getattr(KitOptions(), field)
        described = f"{text} (default {default:g})"
        parser.add_argument(flag, dest=field, type=type(default), default=default, metavar=metavar, help=described)
    add_security_options(parser)
    parser.set_defaults(handler=_conformance)


def _conformance(arguments: argparse.Namespace) -> int:
    if arguments.address is None and arguments.command is None:
        raise ConfigError("conformance: give the ADDRESS of a server, or a --command that starts one")
    options = KitOptions(
        run=arguments.run,
        samples=max(arguments.samples, 64),
        quiet_seconds=arguments.quiet_seconds,
        check_seconds=arguments.check_seconds,
        call_seconds=arguments.check_seconds,
        start_seconds=arguments.start_seconds,
        stop_seconds=arguments.stop_seconds,
        tolerance=arguments.tolerance,
        context_length=arguments.context_length,
    )
    security = security_of(arguments)
    own_server = (
        None
        if arguments.command is None
        else partial(started, shlex.split(arguments.command), security, options.start_seconds)
    )
    results = asyncio.run(_results(arguments.address, security, options, arguments.weights, own_server))
    if arguments.junit is not None:
        try:
            arguments.junit.write_bytes(junit(results, f"leeway conformance {arguments.address or arguments.command}"))
        except OSError as error:
            raise ConfigError(f"{arguments.junit}: cannot be written: {error.strerror}") from error
    _print_table(results)
    return exit_code(results)


async def _results(
    address: str | None, security: Security, options: KitOptions, weights: Path | None, own_server: Starter | None
) -> list[Result]:
    """Test the server at an address, or else one that the command starts."""
    if address is not None:
        return await _test(address, security, options, weights, own_server)
    assert own_server is not None
    async with own_server() as server:
        return await _test(server.address, security, options, weights, own_server)


async def _test(
    address: str, security: Security, options: KitOptions, weights: Path | None, own_server: Starter | None
) -> list[Result]:
    client = BackendClient(address, security, options.call_seconds)
    try:
        base = checkpoint_weights(weights) if weights else None
        try:
            info = await client.info(timeout_seconds=min(options.call_seconds, _ANSWER_SECONDS))
        except Refused as refusal:
            raise UnavailableError(f"{address}: {refusal}; is an InferenceService there?") from refusal
        except InvalidDataError:
            pass  # a finding, which INFO-1 reports
        else:
            if base is None and is_arithmetic(info.signature):
                base = arithmetic_weights()
            if base is None and info.version is None:
                raise ConfigError(f"{address} serves no weights yet; give those of its model with --weights DIR")
        session = Session(client, options, base, security, own_server)
        results: list[Result] = []
        console = Console(stderr=True, highlight=False)
        with console.status("testing") as status:
            async for result in kit.run(session):
                results.append(result)
                status.update(f"{len(results)} of {len(kit.REQUIREMENTS)}: {result.requirement.id}")
        order = [requirement.id for requirement in kit.REQUIREMENTS]
        return sorted(results, key=lambda result: order.index(result.requirement.id))
    finally:
        await client.aclose()


def _print_table(results: Sequence[Result]) -> None:
    console = Console(highlight=False)
    if console.width < _NARROWEST_TABLE and not console.is_terminal:
        console = Console(highlight=False, width=_NARROWEST_TABLE)
    table = Table(box=None, pad_edge=False)
    for name in ("requirement", "", "", "what was seen"):
        table.add_column(name, no_wrap=not name, overflow="fold")
    family = ""
    for result in results:
        requirement = result.requirement
        if requirement.id.partition("-")[0] != family and family:
            table.add_section()
        family = requirement.id.partition("-")[0]
        table.add_row(
            requirement.id,
            Text(result.status.value, style=_STYLES[result.status]),
            requirement.title,
            Text(printable(result.detail), style="" if result.status is Status.FAILED else "dim"),
        )
    console.print(table)
    counts = ", ".join(f"{sum(result.status is status for result in results)} {status.value}" for status in Status)
    console.print(Text(counts))
