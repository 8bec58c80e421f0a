"""How a run is named: its folder, its configuration file, or the name of an example.

Examples are installed with the package, or lie beside it in a checkout.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import leeway
from learner.run_artifacts.journal import read_journal
from leeway.config import Document, RunConfiguration, RunOptions, load_configuration, load_document
from leeway.errors import ConfigError, NotFoundError, PreconditionError


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A run's folder and the configuration of its services."""

    directory: Path
    config_path: Path
    configuration: RunConfiguration


def open_run_folder(path: Path) -> RunFolder:
    """The run at a path.

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
    """True if `leeway run` made it."""
    return _configuration(path).is_file()


def has_finished(directory: Path) -> bool:
    """True if the run's summary says that it has finished."""
    path = directory / "summary.json"
    return path.exists() and bool(json.loads(path.read_text(encoding="utf-8"))["finished"])


def _configuration(directory: Path) -> Path:
    return directory / "config.toml"


def prepare_run_folder(run: RunOptions, *, resume: bool) -> None:
    """Make the run's folder. One that holds anything trained or measured is never overwritten.

    Raises:
        PreconditionError: there is a run in it that does not go with `resume`.
    """
    directory = run.run_directory
    started = bool(read_journal(directory / "metrics.jsonl"))
    if resume and not started:
        raise PreconditionError(f"{directory}: there is no run to resume; start it without --resume")
    if started and has_finished(directory):
        report = directory / "report.html"
        raise PreconditionError(
            f"{directory}: this run is finished{f'; its report is {report}' if report.exists() else ''}. "
            "To train again, choose another name with --set run.name=NAME, or remove the folder"
        )
    if started and not resume:
        raise PreconditionError(
            f"{directory}: holds an unfinished run; continue it with --resume, "
            "or choose another name with --set run.name=NAME"
        )
    if not started:  # what a refused start left behind
        for name in ("replay", "checkpoints"):
            shutil.rmtree(directory / name, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)


def load_run_document(given: Path, overrides: Sequence[str]) -> Document:
    """The configuration in a file, or of an example; an example's run is put into the working directory.

    Raises:
        ConfigError: the file cannot be used, or there is no such example.
    """
    if given.is_file() or given.name != str(given) or given.suffix:
        return load_document(given, overrides)
    examples = {path.stem: path for path in _examples().glob("*.toml")}
    if given.name not in examples:
        raise ConfigError(f"{given}: neither a file nor an example; the examples are {', '.join(sorted(examples))}")
    return load_document(examples[given.name], [f"run.directory={Path.cwd() / 'runs'}", *overrides])


def _examples() -> Path:
    package = Path(leeway.__file__).parent
    installed = package / "examples"
    return installed if installed.is_dir() else package.parent / "examples"
