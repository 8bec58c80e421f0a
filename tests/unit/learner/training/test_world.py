"""Where a learner computes."""

from __future__ import annotations

import pytest
import torch

from learner.training.world import World, compute_device
from leeway.errors import ConfigError


def test_auto_is_a_gpu_only_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, kind in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=found: found)
        assert compute_device("auto").type == kind
        assert compute_device("cpu").type == "cpu"
    assert World().device.type == "cpu"


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"learner\.training\.device"):
        compute_device("cuda")
