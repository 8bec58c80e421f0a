"""What a configuration names, opened: the second step of a check, by those who use it and before a model is loaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from leeway.config.configuration import RunConfiguration
from leeway.errors import ConfigError
from leeway.service.plugins import load_function
from leeway.tasks import TaskSet, load_tasks


def check_references(configuration: RunConfiguration) -> None:
    """Open all of it on one machine, as `leeway run` does for its services.

    Raises:
        ConfigError: naming file and key.
    """
    for engine in sorted(configuration.engine_names()):
        python = configuration.inference_server.python_of(engine)
        if python is not None and not python.is_file():
            raise configuration.refused(f"inference_server.{engine}.python: there is no interpreter {python}")
    open_tasks(configuration)
    open_reward(configuration)


def open_tasks(configuration: RunConfiguration) -> TaskSet:
    """Look for the model's files and for torch, where they are needed, and open the tasks.

    Raises:
        ConfigError: naming file and key.
    """
    if configuration.learner.trainer != "arithmetic":
        directory = configuration.model.directory
        for name in ("config.json", "tokenizer_config.json"):
            if not (directory / name).is_file():
                raise configuration.refused(
                    f"model.path: {directory} is not a Hugging Face model with its tokenizer: no {name}"
                )
    if configuration.network.uses_broadcasts and importlib.util.find_spec("torch") is None:
        raise configuration.refused(
            f'network.weights: "{configuration.network.weights}" needs torch in every process that sends or takes '
            'weights; install it or set "grpc"'
        )
    try:
        tasks = load_tasks(configuration.task, configuration.run.seed)
    except ConfigError as error:
        raise configuration.refused(error.message) from error
    if configuration.evaluation.tasks > len(tasks.heldout):
        raise configuration.refused(
            f"evaluation.tasks: is {configuration.evaluation.tasks}, but there are {len(tasks.heldout)} held-out tasks"
        )
    return tasks


def open_reward(configuration: RunConfiguration) -> Callable[..., Any]:
    """Import the reward function.

    Raises:
        ConfigError: there is no such function.
    """
    try:
        return load_function(configuration.task.reward, configuration.task.python_path)
    except ConfigError as error:
        raise configuration.refused(error.message) from error
