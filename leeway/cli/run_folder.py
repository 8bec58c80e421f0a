"""A run as the commands are told of it: its folder, or the configuration file that its services were started with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from leeway.config import RunConfiguration, load_configuration
from leeway.errors import NotFoundError


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where a run leaves its files, and how its services were configured."""

    directory: Path
    config_path: Path
    configuration: RunConfiguration


def open_run_folder(path: Path) -> RunFolder:
    """The run that a person named.

    Raises:
        NotFoundError: there is none.
        ConfigError: its configuration cannot be read.
    """
    if path.is_file():
        configuration = load_configuration(path)
        return RunFolder(configuration.run.run_directory, path, configuration)
    if not is_run_folder(path):
        raise NotFoundError(
            f"{path}: holds no run (no config.toml); give the folder of one, such as runs/sortmix8, or the "
            "configuration file that its services were started with"
        )
    return RunFolder(path, _configuration(path), load_configuration(_configuration(path)))


def is_run_folder(path: Path) -> bool:
    """Whether `leeway run` made it."""
    return _configuration(path).is_file()


def has_finished(directory: Path) -> bool:
    """Whether the run's summary says that it has finished."""
    path = directory / "summary.json"
    return path.exists() and bool(json.loads(path.read_text(encoding="utf-8"))["finished"])


def _configuration(directory: Path) -> Path:
    return directory / "config.toml"
