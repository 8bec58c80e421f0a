from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from leeway.conformance.weights import Weights, checkpoint_weights, flipped, pieces, renamed, rolled
from leeway.errors import ConfigError
from leeway.weights.digests import verify_weights


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    save_file({"b.x": np.arange(6, dtype=np.float32).reshape(3, 2)}, tmp_path / "model-2.safetensors")
    save_file(
        {"a": np.array([1, 2], dtype=np.float16), "c": np.array([7], dtype=np.int64)}, tmp_path / "model-1.safetensors"
    )
    return checkpoint_weights(tmp_path)


def test_tensors_of_all_files_in_order_of_name(weights: Weights) -> None:
    assert [(entry.name, entry.dtype, entry.shape) for entry in weights.manifest.tensors] == [
        ("a", "float16", (2,)),
        ("b.x", "float32", (3, 2)),
        ("c", "int64", (1,)),
    ]
    assert np.frombuffer(weights.buffers[1], dtype=np.float32).tolist() == [0, 1, 2, 3, 4, 5]
    verify_weights(weights.manifest, weights.buffers, weights.digest)


def test_rolled_weights_are_others_that_fit(weights: Weights) -> None:
    other = rolled(weights)
    assert np.frombuffer(other.buffers[1], dtype=np.float32).tolist() == [2, 3, 4, 5, 0, 1]
    verify_weights(other.manifest, other.buffers, other.digest)
    shapes = [[(entry.name, entry.dtype, entry.shape) for entry in each.manifest.tensors] for each in (weights, other)]
    assert shapes[0] == shapes[1]
    assert other.digest != weights.digest


def test_broken_weights_are_broken(weights: Weights) -> None:
    before, after = b"".join(weights.buffers), b"".join(flipped(weights.buffers))
    assert sum((a ^ b).bit_count() for a, b in zip(before, after, strict=True)) == 1
    assert renamed(weights).digest != weights.digest


@pytest.mark.parametrize("sizes", [(), (1,), (1, 5, 3), (100,)])
def test_pieces_are_the_bytes_cut_as_asked(weights: Weights, sizes: tuple[int, ...]) -> None:
    whole = b"".join(weights.buffers)
    cut = list(pieces(weights.buffers, sizes))
    assert b"".join(cut) == whole
    assert [len(piece) for piece in cut[: len(sizes)]] == [min(size, len(whole)) for size in sizes]


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="safetensors"):
        checkpoint_weights(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"no such thing")
    with pytest.raises(ConfigError, match="cannot be read"):
        checkpoint_weights(tmp_path)
