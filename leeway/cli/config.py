"""`leeway config [SECTION[.KEY]]`: every key of the configuration, or its value in a file."""

from __future__ import annotations

import argparse
from pathlib import Path

from leeway.config import load_configuration
from leeway.config.reference import markdown, text, value_of
from leeway.service.process import EXIT_OK, add_override_option


def declare(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.description = (
        "Describe the keys of the configuration: type, range, default and meaning. With --file, print the resolved "
        "values of a configuration file, defaults included."
    )
    parser.add_argument("name", nargs="?", default="", metavar="SECTION[.KEY]", help="a section or a key")
    parser.add_argument("--file", type=Path, metavar="FILE", help="print the values of this TOML configuration")
    add_override_option(parser)
    parser.add_argument("--markdown", action="store_true", help="print docs/configuration.md")
    parser.set_defaults(handler=_config)


def _config(arguments: argparse.Namespace) -> int:
    if arguments.markdown:
        print(markdown(), end="")
    elif arguments.file:
        print(value_of(load_configuration(arguments.file, arguments.overrides), arguments.name))
    else:
        print(text(arguments.name))
    return EXIT_OK
