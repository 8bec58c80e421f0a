"""Memory that is freed is kept for the next message instead of being given back and faulted in again, page by page.

Chunks and messages of up to a mebibyte come and go. The C library maps each of that size by itself and unmaps it when
it is freed, so that the kernel clears every page anew: more than all the copying costs.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_KEPT_BYTES: Final = 128 << 20
_MAPPED_BYTES: Final = 32 << 20
"""The largest threshold that glibc takes."""


def keep_freed_memory() -> None:
    """Tell glibc to; other C libraries stay as they are."""
    mallopt: Any = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
