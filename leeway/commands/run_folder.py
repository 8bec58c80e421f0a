"""The folder of a run: runs/NAME."""

from __future__ import annotations

from pathlib import Path

from leeway.config import Document, load_document
from leeway.errors import NotFoundError


def load_run_document(directory: Path) -> Document:
    """The resolved configuration of a run's folder.

    Raises:
        NotFoundError: the folder holds no run.
    """
    path = directory / "config.toml"
    if not path.exists():
        raise NotFoundError(
            f"{directory}: holds no run (no config.toml); give the folder of one, such as runs/sortmix8"
        )
    return load_document(path)
