"""A disk that tests hold back."""

from __future__ import annotations

import threading
from pathlib import Path

from replay_buffer.storage.segments import AppendFile, SegmentFile
from tests.deadlines import WAIT_SECONDS


class HeldDisk:
    """A disk that syncs only when it may, and an account of what it promised."""

    def __init__(self) -> None:
        self.may_sync = threading.Event()
        self.may_sync.set()
        self.synced = threading.Event()
        self.durable_bytes: dict[Path, int] = {}

    def open(self, path: Path) -> SegmentFile:
        disk = self

        class File(AppendFile):
            def sync(self) -> None:
                disk.synced.set()
                assert disk.may_sync.wait(WAIT_SECONDS)
                super().sync()
                disk.durable_bytes[path] = path.stat().st_size

        return File(path)
