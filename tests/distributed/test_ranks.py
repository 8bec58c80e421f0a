"""Two ranks under torchrun take the steps that one process would take, and read each other's checkpoints."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from learner.training.world import World
from leeway.service.ports import free_port
from tests.deadlines import RUN_SECONDS
from tests.distributed.ranks import CASES, RESUMED, STEPS, make, published, train

pytestmark = pytest.mark.timeout(600)

RANKS = Path(__file__).parent / "ranks.py"
ROOT = RANKS.parents[2]

Tensors = dict[str, NDArray[np.float32]]


def torchrun(folder: Path) -> None:
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"),
            *(f"--master-port={free_port('127.0.0.1')}", str(RANKS), str(folder)),
        ],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        timeout=RUN_SECONDS,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]


def outcome(folder: Path, case: str) -> tuple[dict[str, Any], Tensors]:
    return json.loads((folder / f"{case}.json").read_text()), load_file(folder / f"{case}.safetensors")


def alone(case: str) -> tuple[dict[str, Any], Tensors]:
    """One process on all groups."""
    trainer = make(case, None)
    statistics = train(case, trainer, World(), range(1, STEPS + 1), None)
    return statistics, published(trainer)


def assert_close(found: tuple[dict[str, Any], Tensors], expected: tuple[dict[str, Any], Tensors]) -> None:
    """Statistics and weights agree to 1e-5 relative (a tensor: relative to its largest entry)."""
    for step in found[0].keys() & {"1", "2", "3", "4"}:
        assert found[0][step].keys() == expected[0][step].keys()
        for name, value in expected[0][step].items():
            assert math.isclose(found[0][step][name], value, rel_tol=1e-5, abs_tol=1e-7), (step, name)
    assert found[0]["logprobs"].keys() == expected[0]["logprobs"].keys()
    for name, values in expected[0]["logprobs"].items():
        np.testing.assert_allclose(found[0]["logprobs"][name], values, rtol=1e-5, atol=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, tensor in expected[1].items():
        assert np.abs(found[1][name] - tensor).max() <= 1e-5 * np.abs(tensor).max(), name


@dataclass(frozen=True)
class Together:
    """What two ranks wrote, and what one process found that saved what they resumed from."""

    folder: Path
    expected: dict[str, tuple[dict[str, Any], Tensors]]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Together:
    """One start of the ranks for everything they are asked for."""
    folder = tmp_path_factory.mktemp("two-ranks")
    expected: dict[str, tuple[dict[str, Any], Tensors]] = {}
    for case in RESUMED:
        trainer = make(case, None)
        statistics = train(case, trainer, World(), range(1, STEPS + 1), folder / f"{case}-saved-alone")
        expected[case] = (statistics, published(trainer))
    torchrun(folder)
    return Together(folder, expected)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one_process(two_ranks: Together, case: str) -> None:
    assert_close(outcome(two_ranks.folder, case), alone(case))


@pytest.mark.parametrize("case", ["dense", "dense-proximal", "dense-lora", "moe"])
def test_what_two_ranks_saved_one_process_continues(two_ranks: Together, case: str) -> None:
    saved = two_ranks.folder / f"{case}-saved"
    # Written by each rank for itself, and while steps 3 and 4 were trained.
    assert len(list((saved / "weights").glob("shard-*.safetensors"))) == 2
    trainer = make(case, None)
    trainer.load(saved)
    statistics = train(case, trainer, World(), range(3, STEPS + 1), None)
    assert_close((statistics, published(trainer)), outcome(two_ranks.folder, case))


@pytest.mark.parametrize("case", RESUMED)
def test_what_one_process_saved_two_ranks_continue(two_ranks: Together, case: str) -> None:
    assert_close(outcome(two_ranks.folder, f"{case}-resumed"), two_ranks.expected[case])


def test_ranks_agree_on_what_cannot_be_trained_on(two_ranks: Together) -> None:
    found = outcome(two_ranks.folder, "refuse")
    first, second = found[0].pop("messages")
    assert first == second  # rank 0 does not hold the group, but names it
    assert len(first) == 2
    assert "group-1: trajectory group-1-2 has a loss that is not finite" in first[0]
    assert "group-1: trajectory group-1-2 makes the gradient not finite" in first[1]
    assert_close(found, alone("refuse"))  # nothing had changed
