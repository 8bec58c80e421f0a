"""Memory comes back when nothing refers to it, and never before."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from inference_server.weights.collective import HostMemory


def test_what_is_still_referred_to_is_never_lent_again() -> None:
    memory = HostMemory()
    whole = memory.take(1000)
    whole[:] = bytes(1000)
    held = np.frombuffer(whole[100:200].toreadonly(), np.uint16)[3:5]
    del whole
    gc.collect()
    memory.take(1000)[:] = b"\xff" * 1000
    assert not held.any()


@pytest.mark.parametrize("size_bytes", [1, 999, 1000])
def test_what_is_free_is_lent_again(size_bytes: int) -> None:
    memory = HostMemory()
    whole = memory.take(1000)
    whole[:4] = b"mark"
    del whole
    assert bytes(memory.take(size_bytes)[:1]) == b"m"


def test_more_or_larger_memory_is_fresh_and_only_some_is_kept() -> None:
    memory = HostMemory(keep=1)
    one, other = memory.take(1000), memory.take(1000)
    one[:1] = other[:1] = b"x"
    del one, other
    assert len(memory._free) == 1
    assert bytes(memory.take(1001)[:1]) == b"\0"
    assert len(memory.take(0)) == 0
    none = HostMemory(keep=0)
    none.take(10)
    assert not none._free
