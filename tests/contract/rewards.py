"""Reward functions of contract tests: called in this process, or as worker processes import them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from inference_server.rollout.reward import RewardRunner
from leeway.config import RewardOptions
from leeway.service.metrics import InferenceServerMetrics
from leeway.tasks import Task
from leeway.types import TrajectoryFailure


class InProcessReward(RewardRunner):
    """Starts no process: for tests that are about something else."""

    def __init__(self, function: Callable[[str], float] = len) -> None:
        self._of_completion = function

    async def start(self) -> None:
        pass

    async def aclose(self) -> None:
        pass

    async def score(self, task: Task, completion: str, where: str) -> float | TrajectoryFailure:
        return self._of_completion(completion)


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


def faulty_reward(options: RewardOptions) -> RewardRunner:
    metrics = InferenceServerMetrics(CollectorRegistry())
    return RewardRunner(f"{__name__}:faulty", Path(__file__).parents[2], options, metrics)
