"""`leeway health ADDRESS`: checks that a service answers."""

from __future__ import annotations

import argparse
import asyncio

from leeway.cli.command import add_security_options, security_of
from leeway.rpc import check_health
from leeway.service.process import EXIT_OK


def declare(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.description = "Check that a service answers. Exit code 0 if it does; meant for container health checks."
    parser.add_argument("address", help="host:port")
    parser.add_argument("--timeout", type=float, default=5.0, metavar="SECONDS", help="longest wait (default 5)")
    add_security_options(parser)
    parser.set_defaults(handler=_health)


def _health(arguments: argparse.Namespace) -> int:
    asyncio.run(check_health(arguments.address, security_of(arguments), arguments.timeout))
    print(f"{arguments.address} is serving")
    return EXIT_OK
