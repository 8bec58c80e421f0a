"""`leeway health ADDRESS`: is the service there? For container health checks."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import Any

from leeway.rpc import Security, check_health
from leeway.service.process import EXIT_OK


def add_parser(subparsers: Any) -> None:  # noqa: ANN401 (argparse names its type privately)
    """Declare the command."""
    parser = subparsers.add_parser("health", help="ask a service whether it serves", description=__doc__)
    parser.add_argument("address", help="host:port")
    parser.add_argument("--timeout", type=float, default=5.0, metavar="SECONDS", help="longest wait (default 5)")
    for name in ("certificate", "key", "authority"):
        parser.add_argument(f"--{name}", type=Path, metavar="PEM", help="for mutual TLS, all three")
    parser.set_defaults(handler=_health)


def _health(arguments: argparse.Namespace) -> int:
    security = Security.from_files(arguments.certificate, arguments.key, arguments.authority, insecure=True)
    asyncio.run(check_health(arguments.address, security, arguments.timeout))
    print(f"{arguments.address} is serving")
    return EXIT_OK
