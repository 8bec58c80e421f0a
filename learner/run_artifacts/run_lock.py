"""One learner at a time in a run's folder: only the holder of its lock writes checkpoints, journal and receipts.

The epoch fences an older learner at the replay buffer, not on the disk that both write to. The lock belongs to the live
process and ends with it, however it ends, so a crash leaves nothing to clean up. It holds among processes that see
the same file system's locks: on one host, and on network file systems that pass `flock` on.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from leeway.errors import ConfigError, UnavailableError
from leeway.service.durable import hold_file, make_directory

FILE: Final = "learner.lock"


@contextmanager
def held_run(directory: Path) -> Generator[None]:
    """Hold a run's folder for this process.

    Raises:
        UnavailableError: another learner is alive in it; when that one has ended, the same call succeeds.
        ConfigError: the folder cannot be used.
    """
    path = directory / FILE
    try:
        make_directory(directory)
        descriptor = hold_file(path)
    except BlockingIOError:
        holder = ""
        with suppress(OSError):
            holder = path.read_text(encoding="ascii", errors="replace").strip()
        process = f"process {holder}" if holder else "a process"
        raise UnavailableError(
            f"{directory}: another learner, {process}, is running in this folder; stop it, or wait until it ends"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be used: {error.strerror}") from error
    try:
        with suppress(OSError):  # a full disk: the number only helps a learner that is refused
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)
