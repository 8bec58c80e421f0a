"""`leeway`: run and inspect.

Each command is a module of this package with `add_parser(subparsers)`; its handler returns the exit code.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from leeway.cli import buffer, conformance, export, fleet, health, loss, replay_step, report, rollouts, run
from leeway.errors import LeewayError
from leeway.service.process import report_error

Handler = Callable[[argparse.Namespace], int]


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="leeway", description="Asynchronous off-policy reinforcement learning for language models."
    )
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (run, fleet, rollouts, buffer, replay_step, export, report, loss, conformance, health):
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; a LeewayError becomes one line and an exit code."""
    arguments = build_parser().parse_args(argv)
    handler: Handler = arguments.handler
    try:
        return handler(arguments)
    except LeewayError as error:
        return report_error("leeway", error)


if __name__ == "__main__":
    sys.exit(main())
