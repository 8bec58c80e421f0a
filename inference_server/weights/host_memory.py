"""Memory for weights that is used again: touching fresh pages costs about as much as receiving into them.

A region is lent as a view and comes back by itself when nothing refers to it any more, not even a slice of a slice. So
bytes that an engine or a held snapshot still uses are never overwritten, whoever forgets about them.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from typing import Any

import numpy as np


class HostMemory:
    """Regions of anonymous memory.

    Args:
        keep: free regions that are kept; more are given back to the system.
    """

    def __init__(self, keep: int = 1) -> None:
        self._keep = keep
        self._free: list[mmap.mmap] = []
        self._lock = threading.Lock()

    def take(self, size_bytes: int) -> memoryview:
        """Writable bytes, with whatever was in them before."""
        with self._lock:
            region = next((region for region in self._free if len(region) >= size_bytes), None)
            if region is not None:
                self._free.remove(region)
        if region is None:
            region = mmap.mmap(-1, max(size_bytes, 1))
        lent: Any = np.frombuffer(region, np.uint8, size_bytes)
        weakref.finalize(lent, self._take_back, region).atexit = False
        return memoryview(lent)

    def _take_back(self, region: mmap.mmap) -> None:
        with self._lock:
            self._free.append(region)
            del self._free[: len(self._free) - self._keep]
