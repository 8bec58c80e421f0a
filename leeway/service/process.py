"""A service as a process: its arguments, its log, its signals, its exit code.

SIGTERM and SIGINT set the stop event that `main` watches; a clean stop follows. A second signal ends the process at
once. A LeewayError ends it with one line on stderr: exit code 2 where a restart would meet the same error
(configuration, precondition, corrupt data), 1 where it may not. A supervisor restarts on 1, on a signal,
and on 0 where the run has not ended.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, Final, TypeVar

from leeway.errors import ConfigError, CorruptDataError, LeewayError, PreconditionError

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_REFUSED: Final = 2

T = TypeVar("T")
Main = Callable[[asyncio.Event], Awaitable[None]]

RUN_FINISHED: Final = "leeway: the run has finished"
"""A server's line on stdout before it exits 0 because its run has finished: a supervisor does not restart it then."""


def service_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """The arguments that every service takes; `prog` is the documented way to start it."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="TOML configuration of the run")
    add_override_option(parser)
    parser.add_argument("--check", action="store_true", help="check the configuration and exit")
    parser.add_argument("--supervised", action="store_true", help="stop when stdin ends, as it does with `leeway run`")
    parser.add_argument("--verbose", action="store_true", help="log details")
    return parser


def add_override_option(parser: argparse.ArgumentParser) -> None:
    """Declare `--set`, for `leeway.config.load_configuration`."""
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override one key; may be repeated",
    )


def configure_logging(service: str, *, verbose: bool = False) -> None:
    """Plain lines on stderr."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.DEBUG if verbose else logging.INFO,
        format=f"%(asctime)s {service} %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    for library in ("grpc", "asyncio", "urllib3", "filelock"):
        logging.getLogger(library).setLevel(logging.WARNING)


def serve(service: str, main: Main, arguments: argparse.Namespace) -> int:
    """Run `main(stop)` until it returns; the exit code says how it ended."""
    configure_logging(service, verbose=arguments.verbose)
    code = EXIT_OK
    try:
        asyncio.run(_with_signals(main, watch_parent=arguments.supervised))
    except* LeewayError as group:
        code = _report(service, _leaves(group))
    return code


def tell_run_finished() -> None:
    """Say on stdout, for a supervisor, that this server ends because its run has finished."""
    print(RUN_FINISHED, flush=True)


def exit_code(error: LeewayError) -> int:
    """2 for what a restart cannot mend, 1 otherwise."""
    return EXIT_REFUSED if isinstance(error, (ConfigError, PreconditionError, CorruptDataError)) else EXIT_FAILED


def report_error(service: str, error: LeewayError) -> int:
    """Print an error's line; returns the exit code it stands for."""
    print(f"{service}: {error.message}", file=sys.stderr, flush=True)
    return exit_code(error)


async def _with_signals(main: Main, *, watch_parent: bool) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            # A second signal ends the process without a clean stop.
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
            signal.raise_signal(signal.SIGTERM)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    if watch_parent:
        # The supervisor holds the other end: when it is gone, however it went, stdin ends.
        await loop.connect_read_pipe(lambda: _StopAtEnd(stop), sys.stdin)
    await main(stop)


class _StopAtEnd(asyncio.Protocol):
    """Sets the stop event when the pipe ends."""

    def __init__(self, stop: asyncio.Event) -> None:
        self._stop = stop

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop.set()


async def unless_stopped(stop: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None when `stop` comes first; `work` is cancelled then."""
    working, stopping = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([working, stopping], return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, stopping):
            task.cancel()
        await asyncio.wait([working, stopping])


def _report(service: str, errors: list[LeewayError]) -> int:
    return max(report_error(service, error) for error in errors)


def _leaves(group: BaseExceptionGroup[LeewayError]) -> list[LeewayError]:
    """The errors of a group, whatever its nesting."""
    leaves: list[LeewayError] = []
    for error in group.exceptions:
        leaves += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return leaves
