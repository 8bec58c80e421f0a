"""What nothing live needs leaves the page cache: the memory of a host does not fill with what was trained on."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from leeway.types import Evaluation, SamplingParams, WriteItem
from replay_buffer.storage import directory as storage_module
from replay_buffer.storage.index_file import oldest_segment
from replay_buffer.storage.segments import segment_path, uncache_segments
from tests.harness.replay_builders import RUN, chunk, filled
from tests.harness.replay_directory import opened


def is_cached(path: Path) -> bool:
    """Whether the first page of a file could be read without the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(descriptor, [bytearray(1)], 0, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            pytest.skip(f"the file system of {path} cannot say what is cached")
        raise
    finally:
        os.close(descriptor)


def test_segments_leave_the_page_cache(tmp_path: Path) -> None:
    for number in (1, 2):
        with segment_path(tmp_path, number).open("wb") as segment:
            segment.write(bytes(1 << 16))
            os.fsync(segment.fileno())
    assert is_cached(segment_path(tmp_path, 1))
    uncache_segments(tmp_path, [1, 3])  # the third one has been deleted
    assert not is_cached(segment_path(tmp_path, 1))
    assert is_cached(segment_path(tmp_path, 2))
    assert segment_path(tmp_path, 1).read_bytes() == bytes(1 << 16)


async def test_only_what_nothing_live_needs_goes_and_each_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone: list[int] = []

    def record(directory: Path, numbers: Iterable[int]) -> None:
        assert directory == tmp_path
        gone.extend(numbers)

    monkeypatch.setattr(storage_module, "uncache_segments", record)
    async with opened(tmp_path) as run:
        await run.open_run()
        for _ in range(3):
            await run.step()
        evaluation = Evaluation("slow", run.state.head, 1, 2, SamplingParams(max_tokens=16))
        await run.buffer.create_evaluation(run.state.epoch, evaluation)
        (slow,), *_ = await run.buffer.acquire_tickets(RUN, "s0", run.state.head, 2, 0)
        run.buffer.write(RUN, [WriteItem(slow.members[0].trajectory_id, 1, 0, chunk([run.state.head]))])
        held = oldest_segment(run.state.groups[slow.group_id])
        assert held is not None
        for _ in range(6):
            await run.step()
        await run.settled()
        assert gone == list(range(1, held))
        run.buffer.write(RUN, filled(slow, [evaluation.version]))
        for _ in range(4):
            await run.step()
        await run.settled()
        newest = run.log.end.segment
        assert held < gone[-1] < newest
        assert gone == list(range(1, gone[-1] + 1))
    gone.clear()
    async with opened(tmp_path) as again:  # what the process before has left in the cache is not known
        for _ in range(4):
            await again.step()
        await again.settled()
        assert gone == list(range(1, gone[-1] + 1))
        assert gone[-1] >= newest
