"""For every test: it leaves nothing open to its neighbours, and starts no process unless it says so.

A test that leaves a file, a pipe or a process fails here, at its own end, and not whichever test runs when they are
collected. Nothing is collected unless something seems to be left, so the check costs next to nothing.
"""

from __future__ import annotations

import gc
import multiprocessing.process
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

# Pytest imports this when it prints its summary, and rewrites it for assertions. In CPython before 3.11.8 a parser that
# was interrupted once refuses every later source (python/cpython#106905), so it comes before anything can interrupt.
import hypothesis.internal.observability  # noqa: F401  # pyright: ignore[reportUnusedImport]
import pytest

WITH_PROCESSES = ("processes", "e2e", "engines")
"""Markers of tests that may start processes."""
_HELPERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver", "matplotlib/mpl-data")
"""Processes of the standard library that serve until the end, and fonts that matplotlib keeps open."""


def _open_files() -> dict[str, str]:
    """Descriptor -> file or pipe.

    Sockets and event descriptors belong to gRPC, which closes them in its own time. A pipe of which this process has
    both ends is one that a library wakes itself with. The helpers of multiprocessing keep theirs until the end.
    """
    found: dict[str, str] = {}
    tracker: Any = resource_tracker._resource_tracker
    server: Any = forkserver._forkserver
    kept = {str(tracker._fd), str(server._forkserver_alive_fd)}
    for entry in os.scandir("/proc/self/fd"):
        try:
            target = os.readlink(entry.path)  # noqa: PTH115 (called after each test)
        except FileNotFoundError:
            continue
        if target.startswith(("/", "pipe:")) and not target.startswith(("/proc/", "/dev/", "/sys/", sys.prefix)):
            found[entry.name] = target
    found = {name: target for name, target in found.items() if name not in kept}
    targets = Counter(found.values())
    return {name: target for name, target in found.items() if not (target.startswith("pipe:") and targets[target] > 1)}


def _children() -> dict[str, str]:
    """Process -> its command line."""
    found: dict[str, str] = {}
    for task in os.scandir("/proc/self/task"):
        try:
            children = Path(task.path, "children").read_text().split()
        except OSError:
            continue
        for child in children:
            try:
                found[child] = Path("/proc", child, "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
    return found


def _left(files: dict[str, str], children: dict[str, str]) -> list[str]:
    """Files and processes beyond those given. A process that was there before may have taken another title since."""
    new = {*_open_files().items()} - {*files.items()}
    new |= {(process, line) for process, line in _children().items() if process not in children}
    return sorted(f"{key} ({value})" for key, value in new if not any(helper in value for helper in _HELPERS))


@pytest.fixture(autouse=True)
def _leaves_nothing_open() -> Iterator[None]:
    before = (_open_files(), _children())
    yield
    if _left(*before):
        gc.collect()
        if left := _left(*before):
            pytest.fail(f"left open: {', '.join(left)}", pytrace=False)


@pytest.fixture(autouse=True)
def _starts_no_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if any(request.node.get_closest_marker(name) for name in WITH_PROCESSES):
        return

    def refused(*_: Any, **__: Any) -> None:
        pytest.fail("a process is started: mark the test with pytest.mark.processes")

    monkeypatch.setattr(subprocess.Popen, "__init__", refused)
    monkeypatch.setattr(subprocess.Popen, "__del__", lambda _: None)
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refused)
