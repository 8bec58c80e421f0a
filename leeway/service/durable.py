"""Files that outlast a process: names that are durable, whole replacements, and files held by one process at a time.

A file's own fsync is not enough: its name lasts only once its directory is synced, and so on upwards.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable.

    Raises:
        OSError: the disk fails.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(directory: Path) -> None:
    """Make a directory and what it lies in, as far as they are missing; their names are durable then.

    Raises:
        OSError: it cannot be made.
    """
    if directory.is_dir():
        # Whoever made it may have died before its name was durable.
        sync_directory(directory.parent)
        return
    make_directory(directory.parent)
    directory.mkdir(exist_ok=True)
    sync_directory(directory.parent)


def sync_file(path: Path) -> None:
    """Make what was written to a file durable; its name is not.

    Raises:
        OSError: the disk fails.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: str | bytes) -> None:
    """Write a file as a whole: after a crash there is the old one or the new one.

    Raises:
        OSError: the disk is full or fails; the old one stands.
    """
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_directory(path.parent)


def publish_directory(partial: Path, path: Path) -> None:
    """Give a folder, whose files and inner folders are durable, its name: after a crash it is whole or not there.

    Raises:
        OSError: the disk is full or fails.
    """
    sync_directory(partial)
    partial.rename(path)
    sync_directory(path.parent)


def hold_file(path: Path) -> int:
    """Hold a file for this process, made if needed; it is let go when the descriptor is closed or the process ends.

    Raises:
        BlockingIOError: another process holds it.
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
