"""The examples that `leeway run NAME` knows: installed with the package, or beside it in a checkout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import leeway
from leeway.config import Document, load_document
from leeway.errors import ConfigError


def load_run_document(given: Path, overrides: Sequence[str]) -> Document:
    """The configuration in a file, or of an example; an example's run is put into the working directory.

    Raises:
        ConfigError: the file cannot be used, or there is no such example.
    """
    if given.is_file() or given.name != str(given) or given.suffix:
        return load_document(given, overrides)
    examples = {path.stem: path for path in _folder().glob("*.toml")}
    if given.name not in examples:
        raise ConfigError(f"{given}: neither a file nor an example; the examples are {', '.join(sorted(examples))}")
    return load_document(examples[given.name], [f"run.directory={Path.cwd() / 'runs'}", *overrides])


def _folder() -> Path:
    package = Path(leeway.__file__).parent
    installed = package / "examples"
    return installed if installed.is_dir() else package.parent / "examples"
