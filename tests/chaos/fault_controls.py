"""The faults of one running process that the driver controls: its wall clock, and the space on its disk.

    driver ── a number and a byte in a shared file ──> process: time.time, datetime.now, writes below its disk

Only the wall clock jumps, as when a person or a time server sets it; monotonic clocks go on. A scarce disk takes
everything, but says that hardly anything is left. A full one takes a part of a write, or none of it, without a
warning (a quota).
"""

from __future__ import annotations

import datetime as datetime_module
import errno
import mmap
import os
import struct
import sys
import time
from collections.abc import Callable, Sequence
from enum import IntEnum
from pathlib import Path
from random import Random
from typing import Any, Final, Self

import replay_buffer.storage.snapshots
from replay_buffer.storage.segments import AppendFile

_LAYOUT: Final = struct.Struct("<dB")
_SERVICES: Final = ("leeway", "replay_buffer", "learner", "inference_server")


class Space(IntEnum):
    """How much a disk still takes."""

    PLENTY = 0
    SCARCE = 1
    FULL = 2


class FaultControls:
    """The shared file of one process, made by the first that opens it."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(_LAYOUT.pack(0.0, Space.PLENTY))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _LAYOUT.size)

    @property
    def clock_offset_seconds(self) -> float:
        return _LAYOUT.unpack(self._memory)[0]

    @property
    def space(self) -> Space:
        return Space(_LAYOUT.unpack(self._memory)[1])

    def set_clock(self, offset_seconds: float) -> None:
        """From now on the process's wall clock is off by so much."""
        _LAYOUT.pack_into(self._memory, 0, offset_seconds, self.space)

    def set_space(self, space: Space) -> None:
        """From now on its disk takes so much."""
        _LAYOUT.pack_into(self._memory, 0, self.clock_offset_seconds, space)


def install_clock(controls: FaultControls) -> None:
    """Let the services read the controlled clock, but not libraries, which compare it with clocks of their own."""
    before = datetime_module.datetime

    class Jumping(before):
        """Like datetime; only `now` asks the controls."""

        @classmethod
        def now(cls, tz: datetime_module.tzinfo | None = None) -> Self:
            return super().now(tz) + datetime_module.timedelta(seconds=controls.clock_offset_seconds)

    jumping_time = _JumpingTime(controls)
    for name, module in list(sys.modules.items()):
        if not name.startswith(_SERVICES):
            continue
        if getattr(module, "time", None) is time:
            module.time = jumping_time  # type: ignore[attr-defined]
        if getattr(module, "datetime", None) is before:
            module.datetime = Jumping  # type: ignore[attr-defined]


class _JumpingTime:
    """Like the module `time`; only the wall clock asks the controls."""

    def __init__(self, controls: FaultControls) -> None:
        self._controls = controls

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def time(self) -> float:
        return time.time() + self._controls.clock_offset_seconds

    def time_ns(self) -> int:
        return time.time_ns() + int(self._controls.clock_offset_seconds * 1e9)


def install_disk(controls: FaultControls, rng: Random) -> None:
    """Let the replay buffer's files be written as the controls say; not the index, since SQLite writes by itself."""
    open_, write = AppendFile.__init__, AppendFile.write
    write_snapshot: Callable[..., int] = replay_buffer.storage.snapshots.write_snapshot

    def opened(self: AppendFile, path: Path) -> None:
        _refuse_if_full(controls)
        open_(self, path)

    def written(self: AppendFile, blocks: Sequence[bytes | memoryview]) -> int:
        if controls.space is not Space.FULL:
            return write(self, blocks)
        data = b"".join(blocks)
        fits = rng.choice((0, rng.randrange(len(data) + 1)))
        if not fits:
            _refuse_if_full(controls)
        return write(self, [data[:fits]])

    def snapshot_written(directory: Path, snapshot: Any) -> int:
        _refuse_if_full(controls)
        return write_snapshot(directory, snapshot)

    AppendFile.__init__, AppendFile.write = opened, written  # type: ignore[method-assign]
    for module in list(sys.modules.values()):
        if getattr(module, "write_snapshot", None) is write_snapshot:
            module.write_snapshot = snapshot_written  # type: ignore[attr-defined]
        if module.__name__.startswith("replay_buffer") and hasattr(module, "free_bytes_of"):
            module.free_bytes_of = _free_bytes(controls, module.free_bytes_of)  # type: ignore[attr-defined]


def _free_bytes(controls: FaultControls, really: Callable[[Path], int]) -> Callable[[Path], int]:
    return lambda directory: 0 if controls.space is Space.SCARCE else really(directory)


def _refuse_if_full(controls: FaultControls) -> None:
    if controls.space is Space.FULL:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
