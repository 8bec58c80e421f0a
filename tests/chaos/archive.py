"""The whole log of a buffer that retires its oldest segments: what it removes is linked elsewhere first."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import replay_buffer.storage.directory
from replay_buffer.storage.segments import segment_path


def install_archive(archive: Path) -> None:
    """Keep what this process's buffer removes."""
    remove = replay_buffer.storage.directory.remove_segments

    def archived(directory: Path, numbers: Iterable[int]) -> None:
        numbers = list(numbers)
        for number in numbers:
            path = segment_path(directory, number)
            with suppress(FileExistsError, FileNotFoundError):  # removed before, and brought back by a loss of power
                os.link(path, archive / path.name)
        remove(directory, numbers)

    replay_buffer.storage.directory.remove_segments = archived


def gather(archive: Path, directory: Path, target: Path) -> Path:
    """A copy of the whole log: what was removed, and what is still there."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for source in (archive, directory):
        for path in source.glob("segment-*.log"):
            shutil.copyfile(path, target / path.name)
    return target
