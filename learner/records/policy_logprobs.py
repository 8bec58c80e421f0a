"""The learner's own log-probs of what it trained on, kept per step for people who ask where pi and mu part.

runs/NAME/policy_logprobs/step-NNNNNNNN.safetensors: trajectory id -> float32 [tokens in the loss], before the step
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import numpy as safetensors_numpy

from leeway.types import Float32Array


def policy_logprobs_path(run_directory: Path, step: int) -> Path:
    """The file of one step."""
    return run_directory / "policy_logprobs" / f"step-{step:08d}.safetensors"


def write_policy_logprobs(run_directory: Path, step: int, logprobs: Mapping[str, Float32Array]) -> None:
    """Write one step's file, replacing one of an abandoned branch."""
    path = policy_logprobs_path(run_directory, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors_numpy.save_file(dict(logprobs), path)


def read_policy_logprobs(run_directory: Path, step: int) -> dict[str, Float32Array]:
    """One step's log-probs; empty when none were kept."""
    path = policy_logprobs_path(run_directory, step)
    return safetensors_numpy.load_file(path) if path.exists() else {}
