"""`leeway serve SERVICE --config FILE`: one service of a run, started by hand or by `leeway run`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any, Final

from leeway.service.children import python_command
from leeway.service.ports import free_port

_MODULES: Final = {
    "replay-buffer": "replay_buffer.__main__",
    "learner": "learner.__main__",
    "inference-server": "inference_server.__main__",
}


def declare(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.description = "Start one service of a run. `leeway serve SERVICE --help` lists its options."
    parser.add_argument("service", choices=tuple(_MODULES), metavar="SERVICE", help=", ".join(_MODULES))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="options of the service")
    parser.set_defaults(handler=_serve)


def _serve(arguments: argparse.Namespace) -> int:
    # Imported by name: each service has packages that the others need not have installed.
    service: Any = importlib.import_module(_MODULES[arguments.service])
    return service.main(arguments.arguments)


def serve_command(service: str, *arguments: str, python: str = sys.executable) -> tuple[str, ...]:
    """The command line of a service, for a child process."""
    return python_command("leeway.cli.main", "serve", service, *arguments, python=python)


def on_ranks(command: Sequence[str], ranks: int) -> tuple[str, ...]:
    """A command as several ranks on this host, under torchrun; itself for one rank."""
    if ranks == 1:
        return tuple(command)
    options = (f"--nproc-per-node={ranks}", "--master-addr=127.0.0.1", f"--master-port={free_port('127.0.0.1')}")
    # Without --no-python torchrun would start the ranks by itself, with the working directory on their path.
    return (*python_command("torch.distributed.run", *options, "--no-python"), *command)
