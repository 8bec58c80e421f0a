"""How much is searched behind a damaged frame: enough to find acknowledged data, never in the measure of its size."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

import replay_buffer.storage.segments
from leeway.errors import CorruptDataError
from replay_buffer.rules.transitions import ChunkWritten, StepsCommitted
from replay_buffer.storage.records import Record, encode
from replay_buffer.storage.segments import frame, verify_segment

NOW = 1_795_331_143_000_000_000


def record(size: int = 10) -> bytes:
    return frame(*encode(Record("r", NOW, ChunkWritten("t", 1, 0, Random(1).randbytes(size), ()))))


@pytest.fixture
def checksums(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of everything that a checksum is taken of."""
    sizes: list[int] = []
    real = replay_buffer.storage.segments.crc32c

    def counted(data: bytes) -> int:
        sizes.append(len(data))
        return real(data)

    monkeypatch.setattr(replay_buffer.storage.segments, "crc32c", counted)
    return sizes


def test_a_large_torn_record_is_cut_off_after_a_short_search(tmp_path: Path, checksums: list[int]) -> None:
    path = tmp_path / "segment-00000001.log"
    path.write_bytes(record() + record(4 << 20)[:-1])
    assert len(list(verify_segment(path, last=True))) == 1
    assert path.read_bytes() == record()
    assert sum(checksums) < 64 << 20


def test_room_that_never_got_its_bytes_is_cut_off(tmp_path: Path, checksums: list[int]) -> None:
    path = tmp_path / "segment-00000001.log"
    path.write_bytes(record() + bytes(4 << 20))
    assert len(list(verify_segment(path, last=True))) == 1
    assert path.read_bytes() == record()
    assert sum(checksums) < 1 << 20


@pytest.mark.parametrize("between", [1, 4096, 2 << 20])
def test_a_record_behind_damage_is_found_wherever_it_lies(tmp_path: Path, between: int) -> None:
    path = tmp_path / "segment-00000001.log"
    damaged = bytearray(record(between))
    damaged[len(damaged) // 2] ^= 1
    after = frame(*encode(Record("r", NOW, StepsCommitted(1))))
    path.write_bytes(record() + damaged + after + bytes(100_000))
    with pytest.raises(CorruptDataError, match="data follows it"):
        list(verify_segment(path, last=True))
