"""Disks of tests: one that forgets what was not synced when the power goes, and one whose syncs are held back.

    service ── os.fsync, os.fdatasync ──> ledger: file -> synced bytes, directory -> names     in the service's process
    driver: kill -9, then power_loss ──> files cut back or torn, new names gone, removed and replaced files back
    oracle: DurableView ──> what would be left if the power went now

kill -9 alone keeps the page cache and proves nothing about fsync. The model is POSIX, not one file system: a file's
bytes are durable up to its length at the last fsync of it, a name is durable from the last fsync of its directory on;
whatever happened since may or may not have reached the disk. Files are expected to be appended to or written once. What
the ledger says was synced is kept by hard links, so that a removed or replaced file can come back.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Final

from replay_buffer.storage.segments import AppendFile, SegmentFile
from tests.deadlines import WAIT_SECONDS

LEDGER: Final = "ledger.jsonl"
LINKS: Final = "links"
_LOST: Final = 0.7
"""Chance that what was not synced is lost."""
_OWN_SYNCS: Final = "index.sqlite"
_SYNCED_UNSEEN: Final = 0.7
"""SQLite syncs where nobody sees it: mostly its files are left as they are, else damaged, which must be noticed."""


@dataclass(slots=True)
class Ledger:
    """What is durable: bytes by file, names by directory; both are known by their inode."""

    sizes: dict[int, int] = field(default_factory=dict[int, int])
    names: dict[int, dict[str, int]] = field(default_factory=dict[int, dict[str, int]])

    @classmethod
    def read(cls, home: Path) -> Ledger:
        """The ledger kept in `home`; a last line that is cut short never was."""
        ledger = cls()
        for line in (home / LEDGER).read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                ledger.take(json.loads(line))
        return ledger

    def take(self, entry: Mapping[str, object]) -> None:
        """One line."""
        match entry:
            case {"file": int(inode), "size": int(size)}:
                self.sizes[inode] = size
            case {"directory": int(inode), "names": dict(names)}:
                self.names[inode] = names
            case _:
                raise AssertionError(entry)


class Witness:
    """Stands between a service and its disk: everything below `root`. Lives in the service's process."""

    def __init__(self, root: Path, home: Path) -> None:
        """What there is now counts as durable."""
        self._root = root.resolve()
        self._links = home / LINKS
        self._held: dict[int, int] = {}  # a directory's inode is not given to another while this process lives
        shutil.rmtree(self._links, ignore_errors=True)
        self._links.mkdir(parents=True)
        first = home / "ledger.new"
        self._file = first.open("w")
        for path in [self._root, *sorted(self._root.rglob("*"))]:
            if path.is_dir():
                self._directory(path)
            else:
                self._tell({"file": path.stat().st_ino, "size": path.stat().st_size})
        first.replace(home / LEDGER)

    def install(self) -> None:
        """From now on every sync of this process passes here; files elsewhere go to the real disk."""
        for name in ("fsync", "fdatasync"):
            setattr(os, name, self._syncing(getattr(os, name)))

    def close(self) -> None:
        """Let everything go; nothing is witnessed any more once the real functions are back."""
        self._file.close()
        for descriptor in self._held.values():
            os.close(descriptor)

    def _syncing(self, really: Callable[[int], None]) -> Callable[[int], None]:
        def sync(descriptor: int) -> None:
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            if not path.is_relative_to(self._root):
                really(descriptor)
            elif path.is_dir():
                self._directory(path)
            else:
                status = os.fstat(descriptor)
                if status.st_nlink:
                    self._keep(path, status.st_ino)
                self._tell({"file": status.st_ino, "size": status.st_size})

        return sync

    def _directory(self, path: Path) -> None:
        inode = path.stat().st_ino
        if inode not in self._held:
            self._held[inode] = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        names: dict[str, int] = {}
        for entry in os.scandir(path):
            names[entry.name] = entry.inode()
            if entry.is_file(follow_symlinks=False):
                self._keep(Path(entry.path), entry.inode())
        self._tell({"directory": inode, "names": names})

    def _keep(self, path: Path, inode: int) -> None:
        if not (self._links / str(inode)).exists():
            os.link(path, self._links / str(inode))

    def _tell(self, entry: Mapping[str, object]) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()


@dataclass(slots=True)
class Losses:
    """What a loss of power did."""

    discarded_bytes: int = 0
    torn_files: int = 0  # a part of the unsynced bytes survived, or bytes that were never written took their place
    lost_names: int = 0
    undone_removals: int = 0

    def add(self, other: Losses) -> None:
        """Sum up."""
        self.discarded_bytes += other.discarded_bytes
        self.torn_files += other.torn_files
        self.lost_names += other.lost_names
        self.undone_removals += other.undone_removals


def power_loss(root: Path, home: Path, rng: Random, *, lose_all: bool = False) -> Losses:
    """Leave of `root` what a disk may hold after the power went; the processes that wrote there are dead.

    With `lose_all` every byte that was not synced is lost.
    """
    if not (home / LEDGER).exists():
        return Losses()
    crash = _Crash(Ledger.read(home), home / LINKS, rng, lose_all)
    crash.directory(root)
    return crash.losses


class _Crash:
    def __init__(self, ledger: Ledger, links: Path, rng: Random, lose_all: bool) -> None:
        self._ledger = ledger
        self._links = links
        self._rng = rng
        self._lose_all = lose_all
        self.losses = Losses()

    def directory(self, path: Path) -> None:
        durable = self._ledger.names.get(path.stat().st_ino, {})
        now = {entry.name: entry.inode() for entry in os.scandir(path)}
        for name in sorted(now.keys() | durable.keys()):
            own = name.startswith(_OWN_SYNCS) and self._rng.random() < _SYNCED_UNSEEN
            if now.get(name) != durable.get(name) and not own and self._rng.random() < _LOST:
                self._undo(path / name, now.get(name), durable.get(name))
        for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False):
                self.directory(path / entry.name)
            else:
                self._file(path / entry.name, entry.inode())

    def _undo(self, path: Path, now: int | None, durable: int | None) -> None:
        """The name goes back to what it stood for; what stands there now has lost its name."""
        if now is not None:
            self.losses.lost_names += 1
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        if durable is not None:
            self.losses.undone_removals += 1
            self._bring_back(path, durable)

    def _bring_back(self, path: Path, inode: int) -> None:
        if (self._links / str(inode)).exists():
            os.link(self._links / str(inode), path)
        elif inode in self._ledger.names:
            path.mkdir()
            for name, inner in sorted(self._ledger.names[inode].items()):
                if self._rng.random() < 0.5:  # each removal inside may have reached the disk
                    self._bring_back(path / name, inner)

    def _file(self, path: Path, inode: int) -> None:
        size, synced = path.stat().st_size, self._ledger.sizes.get(inode, 0)
        unsynced = size - synced
        if unsynced <= 0 or (path.name.startswith(_OWN_SYNCS) and self._rng.random() < _SYNCED_UNSEEN):
            return
        kept = 0 if self._lose_all else self._rng.choice((0, self._rng.randrange(unsynced + 1)))
        left = unsynced - kept
        junk = self._rng.choice((b"", b"", bytes(self._rng.randrange(left + 1)), self._rng.randbytes(left)))
        junk = b"" if self._lose_all else junk
        with path.open("r+b") as file:
            file.truncate(synced + kept)
            file.seek(synced + kept)
            file.write(junk)
        self.losses.discarded_bytes += left
        self.losses.torn_files += bool(kept and left) or bool(junk)


class DurableView:
    """What is sure to be left below a root if the power goes now."""

    def __init__(self, root: Path, home: Path) -> None:
        self._root = root
        self._ledger = Ledger.read(home)

    def problem(self, path: Path) -> str:
        """Why a file would not be there, whole, after a loss of power; empty when it would."""
        at = self._root
        for part in path.relative_to(self._root).parts:
            inode = at.stat().st_ino
            at /= part
            if not at.exists():
                return f"{at} does not exist"
            if self._ledger.names.get(inode, {}).get(part) != at.stat().st_ino:
                return f"the name of {at} is not synced"
        if path.is_file() and self._ledger.sizes.get(path.stat().st_ino, 0) < path.stat().st_size:
            return f"{path} is not synced"
        return ""

    def names(self, path: Path) -> list[str]:
        """The durable names in a directory."""
        return sorted(self._ledger.names.get(path.stat().st_ino, {}))


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
