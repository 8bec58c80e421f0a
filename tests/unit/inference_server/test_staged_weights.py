"""A staged snapshot is what any reader of safetensors finds, and gone afterwards."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from inference_server.engines.process.staged_weights import remove_abandoned, staged_weights
from leeway.errors import PreconditionError
from leeway.huggingface import tensor_bytes
from leeway.types import PolicyVersion, WeightManifest, WeightSnapshot
from leeway.weights.digests import tensor_entry, weights_digest
from tests.harness import tiny_models

CHECKOUT = Path(__file__).parents[3]


@pytest.mark.parametrize("dtype_name", ["float32", "bfloat16"])
def test_tensors_are_read_back_bit_for_bit(tmp_path: Path, dtype_name: str) -> None:
    # A model that keeps some tensors in float32 whatever the rest is.
    snapshot = tiny_models.snapshot(tiny_models.make_model(0, family="deepseek_v3"), dtype_name=dtype_name)
    with staged_weights(snapshot, tmp_path) as folder:
        tensors = load_file(folder / "model.safetensors")
        assert folder.stat().st_mode & 0o077 == 0
    assert list(tmp_path.iterdir()) == []
    assert tensors.keys() == {entry.name for entry in snapshot.manifest.tensors}
    for entry, buffer in zip(snapshot.manifest.tensors, snapshot.buffers, strict=True):
        assert tuple(tensors[entry.name].shape) == entry.shape
        assert tensor_bytes(tensors[entry.name]) == bytes(buffer)


def test_a_place_that_cannot_take_them_is_named(tmp_path: Path) -> None:
    snapshot = tiny_models.snapshot(tiny_models.make_model(0))
    with pytest.raises(PreconditionError, match="staging_directory"), staged_weights(snapshot, tmp_path / "nowhere"):
        pass


def test_what_is_no_weight_is_refused(tmp_path: Path) -> None:
    data = np.zeros(2, np.int32).tobytes()
    manifest = WeightManifest((tensor_entry("ids", "int32", (2,), data),))
    snapshot = WeightSnapshot(PolicyVersion("run", 1, 0, weights_digest(manifest)), 1, manifest, [data])
    with pytest.raises(PreconditionError, match="ids is int32"), staged_weights(snapshot, tmp_path):
        pass


_KILLED_WITH_WEIGHTS = """
import fcntl, os, pathlib, signal, sys
from inference_server.engines.process.staged_weights import staged_weights
from tests.unit.inference_server.fake_driver import snapshot

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[2] == "before it is locked":
    fcntl.flock = die
with staged_weights(snapshot(1), pathlib.Path(sys.argv[1])):
    die()
"""


@pytest.mark.parametrize("when", ["staged", "before it is locked"])
@pytest.mark.processes
def test_what_a_killed_server_left_is_removed_and_nothing_else(tmp_path: Path, when: str) -> None:
    snapshot = tiny_models.snapshot(tiny_models.make_model(0))
    other = tmp_path / "leeway-other"
    other.mkdir()
    with staged_weights(snapshot, tmp_path) as mine:
        command = [sys.executable, "-c", _KILLED_WITH_WEIGHTS, str(tmp_path), when]
        killed = subprocess.run(command, cwd=CHECKOUT, check=False)
        assert killed.returncode == -signal.SIGKILL
        assert len(list(tmp_path.iterdir())) == 3
        remove_abandoned(tmp_path)
        assert set(tmp_path.iterdir()) == {mine, other}
        assert (mine / "model.safetensors").is_file()
    assert list(tmp_path.iterdir()) == [other]


@pytest.mark.parametrize("before", [(os, "open"), (fcntl, "flock")], ids=["it is opened", "it is locked"])
def test_a_folder_taken_for_abandoned_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: tuple[ModuleType, str]
) -> None:
    module, name = before
    whole: Callable[..., Any] = getattr(module, name)
    started: list[None] = []

    def another_server_starts(*arguments: Any, **named: Any) -> Any:
        if not started:
            started.append(None)
            remove_abandoned(tmp_path)
        return whole(*arguments, **named)

    monkeypatch.setattr(module, name, another_server_starts)
    with staged_weights(tiny_models.snapshot(tiny_models.make_model(0)), tmp_path) as folder:
        assert started
        assert (folder / "model.safetensors").is_file()
        assert list(tmp_path.iterdir()) == [folder]
        remove_abandoned(tmp_path)
        assert folder.is_dir()
