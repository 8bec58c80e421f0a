"""Reward functions of contract tests, as worker processes import them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from inference_server.rollout.reward import RewardRunner
from leeway.config import RewardOptions
from leeway.service.metrics import InferenceServerMetrics


def length(_task: Mapping[str, Any], completion: str) -> float:
    return len(completion)


def modulo(_task: Mapping[str, Any], completion: str) -> float:
    return len(completion) % 5


def hang(_task: Mapping[str, Any], _completion: str) -> float:
    threading.Event().wait()
    return 0.0


def faulty(task: Mapping[str, Any], _completion: str) -> Any:
    """Tasks 0 to 4 go wrong, each in its way."""
    match task["index"]:
        case 0:
            raise ValueError("no verifier")
        case 1:
            return float("nan")
        case 2:
            return "1.0"
        case 3:
            threading.Event().wait()
        case 4:
            os.kill(os.getpid(), signal.SIGSEGV)
        case _:
            pass
    return 1.0


def runner(function: str, options: RewardOptions | None = None) -> RewardRunner:
    return RewardRunner(
        f"{__name__}:{function}",
        Path(__file__).parents[2],
        options or RewardOptions(processes=1),
        InferenceServerMetrics(CollectorRegistry()),
    )
