"""`leeway`: run and inspect.

Each command is a module of this package with `declare(parser)`, which sets the description, the arguments and the
`handler` that returns the exit code. A module is imported when its command is called, so a service does not load what
only reports and tables need.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Final

from leeway.errors import LeewayError
from leeway.service.process import report_error

COMMANDS: Final = {
    "run": "start a run with all its services",
    "serve": "start one service of a run",
    "config": "describe the keys of the configuration, or show their values",
    "rollouts": "show rollouts: text, reward, probabilities per token",
    "report": "draw a run's report again",
    "export": "write a checkpoint as a Hugging Face model",
    "fleet": "list, drain and readmit inference servers",
    "buffer": "inspect and manage the replay buffer",
    "recompute-step": "recompute a past step and compare it bit for bit",
    "loss": "explain a policy loss on given numbers",
    "conformance": "test an inference server against the contract",
    "health": "check that a service answers",
}


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The command line; with a command only its arguments, which is faster."""
    parser = argparse.ArgumentParser(
        prog="leeway", description="Asynchronous off-policy reinforcement learning for language models."
    )
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary)
        if command in (None, name):
            importlib.import_module(f"leeway.cli.{name.replace('-', '_')}").declare(subparser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; a LeewayError becomes one line and an exit code."""
    given = sys.argv[1:] if argv is None else argv
    arguments = build_parser(given[0] if given else "").parse_args(given)
    try:
        return arguments.handler(arguments)
    except LeewayError as error:
        return report_error("leeway", error)


if __name__ == "__main__":
    sys.exit(main())
