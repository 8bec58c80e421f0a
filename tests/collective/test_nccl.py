"""What is NCCL's own: the command for GPUs, and the carrier's device with a torch that only pretends to have one."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from leeway.errors import ConfigError
from leeway.weights.broadcast import carried, nccl_carrier
from leeway.weights.broadcast.nccl_carrier import Gpu
from tests.collective import nccl_check
from tests.collective.cpu_carrier import ROOT
from tests.deadlines import WAIT_SECONDS


def test_without_two_gpus_the_check_says_so_and_fails() -> None:
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.collective.nccl_check"],
        env={"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        check=False,
    )
    assert ended.returncode == 2
    assert "torch finds 0 GPUs" in ended.stdout
    assert f"torch {torch.__version__}" in ended.stdout


def test_the_check_itself_holds_on_a_cpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carried, "_GRACE_SECONDS", 0.5)
    monkeypatch.setattr(nccl_check, "LATE_SECONDS", WAIT_SECONDS)
    code = nccl_check.main(["--on-cpu", "--megabytes", "2", "--patience", "8"])
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert printed.count("ok  ") == 2 + 2 * 3 + 1
    assert "are both on one CPU" in printed


class FakeGroup:
    """Of torch's ProcessGroupNCCL: what is called of it."""

    class Options:
        _timeout: timedelta

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.aborted = 0

    def abort(self) -> None:
        self.aborted += 1


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """A torch with NCCL and a GPU; what of host memory is pinned."""
    pinned: list[tuple[int, int, int]] = []

    def register(address: int, size_bytes: int, flags: int) -> int:
        pinned.append((address, size_bytes, flags))
        return 0 if len(pinned) == 1 else 712

    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(dist, "ProcessGroupNCCL", FakeGroup, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _device: None)
    properties = SimpleNamespace(uuid="1a2b")
    cuda = SimpleNamespace(
        nccl=SimpleNamespace(version=lambda: (2, 28, 9)),
        get_device_properties=lambda _device: properties,
        cudart=lambda: SimpleNamespace(cudaHostRegister=register),
    )
    monkeypatch.setattr(nccl_carrier, "_cuda", cuda)
    return pinned


def test_the_first_gpu_is_named_with_versions_and_forms_groups_with_a_deadline(
    pretended: list[tuple[int, int, int]], caplog: pytest.LogCaptureFixture
) -> None:
    gpu = Gpu()
    assert gpu.name == "nccl/2.28.9 torch/" + torch.__version__.partition("+")[0]
    assert gpu.identity == "1a2b"
    assert gpu.device == torch.device("cuda", 0)
    memory = torch.zeros(5, dtype=torch.uint8)
    gpu.pin(memory)
    assert pretended == [(memory.data_ptr(), 5, 0)]
    gpu.pin(memory)
    assert "not pinned (CUDA error 712)" in caplog.text
    group = gpu.form("store", ("127.0.0.1", 1), 1, 3, 2.5)
    store, rank, size, options = group.arguments
    assert (store, rank, size, options._timeout) == ("store", 1, 3, timedelta(seconds=2.5))
    gpu.leave(group)
    assert group.aborted == 1


def test_no_gpu_and_no_nccl_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for has_nccl, said in ((False, "is a build without NCCL; install"), (True, "finds no GPU; check the driver")):
        monkeypatch.setattr(dist, "is_nccl_available", lambda has_nccl=has_nccl: has_nccl)
        with pytest.raises(ConfigError, match=said) as refusal:
            Gpu()
        assert 'network.weights = "collective"' in refusal.value.message
        assert "\n" not in refusal.value.message
