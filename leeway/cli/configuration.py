"""Every section of a run's configuration together: validated, free ports chosen, references opened."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

from leeway.config import (
    ENGINES,
    Document,
    EvaluationOptions,
    InferenceServerOptions,
    LearnerOptions,
    MetricsOptions,
    ModelOptions,
    NetworkOptions,
    Options,
    ReplayBufferOptions,
    RunOptions,
    SamplingOptions,
    TaskOptions,
    check_recorded_topk,
    read_options,
    section,
    write_document,
)
from leeway.errors import ConfigError
from leeway.service.plugins import load_function
from leeway.service.ports import free_port
from leeway.tasks import load_tasks
from leeway.weights.transports import weight_transports


@dataclass(frozen=True, slots=True)
class RunConfiguration:
    """One field per section."""

    run: RunOptions
    model: ModelOptions
    task: TaskOptions
    sampling: SamplingOptions
    network: NetworkOptions
    metrics: MetricsOptions
    evaluation: EvaluationOptions
    replay_buffer: ReplayBufferOptions
    inference_server: InferenceServerOptions
    learner: LearnerOptions

    def write(self, path: Path) -> None:
        """Save it as TOML that every service reads."""
        sections: dict[str, Options] = {field.name: getattr(self, field.name) for field in fields(self)}
        write_document(path, sections)


def read_configuration(document: Document) -> RunConfiguration:
    """Validate every section, and what only shows between sections or when something is opened.

    Raises:
        ConfigError: naming file and key.
    """
    configuration = RunConfiguration(
        run=section(document, "run", RunOptions),
        model=section(document, "model", ModelOptions),
        task=section(document, "task", TaskOptions),
        sampling=section(document, "sampling", SamplingOptions),
        network=section(document, "network", NetworkOptions),
        metrics=section(document, "metrics", MetricsOptions),
        evaluation=section(document, "evaluation", EvaluationOptions),
        replay_buffer=read_options(document),
        inference_server=section(document, "inference_server", InferenceServerOptions),
        learner=section(document, "learner", LearnerOptions),
    )
    try:
        _check_together(configuration)
    except ConfigError as error:
        raise ConfigError(f"{document.path}: {error.message}") from error
    return configuration


def with_free_ports(configuration: RunConfiguration) -> RunConfiguration:
    """Port 0 replaced by a free port, everywhere."""
    network, metrics = configuration.network, configuration.metrics
    return replace(
        configuration,
        network=network.model_copy(
            update={
                "replay_buffer": _fixed_address(network.replay_buffer),
                "policy": _fixed_address(network.policy),
                "inference_servers": tuple(_fixed_address(address) for address in network.inference_servers),
            }
        ),
        metrics=metrics.model_copy(
            update={
                "replay_buffer": metrics.replay_buffer or free_port(metrics.host),
                "learner": metrics.learner or free_port(metrics.host),
                "inference_servers": tuple(port or free_port(metrics.host) for port in metrics.inference_servers),
            }
        ),
    )


def _check_together(configuration: RunConfiguration) -> None:
    network, metrics = configuration.network, configuration.metrics
    if len(network.inference_servers) != len(metrics.inference_servers):
        raise ConfigError(
            f"metrics.inference_servers: lists {len(metrics.inference_servers)} ports, network.inference_servers "
            f"{len(network.inference_servers)} addresses; give one port per server"
        )
    servers, trainer = configuration.inference_server, configuration.learner.trainer
    if servers.backends and len(servers.backends) != len(network.inference_servers):
        raise ConfigError(
            f"inference_server.backends: lists {len(servers.backends)} addresses, network.inference_servers "
            f"{len(network.inference_servers)}; give one backend per server"
        )
    if servers.engines and len(servers.engines) != len(network.inference_servers):
        raise ConfigError(
            f"inference_server.engines: names {len(servers.engines)} engines, network.inference_servers "
            f"{len(network.inference_servers)} addresses; name one per server"
        )
    engines: set[str] = {servers.engine_of(index) for index in range(len(network.inference_servers))}
    engines = engines or {servers.engine}
    for engine in engines:
        if ENGINES[engine].rehearsal != (trainer == "arithmetic"):
            raise ConfigError(
                f"inference_server.engine is {engine}, but learner.trainer is {trainer}; "
                "a rehearsal needs arithmetic for both"
            )
        python = servers.python_of(engine)
        if python is not None and not python.is_file():
            raise ConfigError(f"inference_server.{engine}.python: there is no interpreter {python}")
    if trainer != "arithmetic":
        _check_model(configuration.model.directory)
        check_recorded_topk(configuration.learner.training, configuration.sampling)
    slots = servers.worker.prefetch + min(servers.options_of(engine).max_concurrency for engine in engines)
    if not servers.backends and configuration.evaluation.members > slots:
        raise ConfigError(
            f"evaluation.members: is {configuration.evaluation.members}, but a server takes at most {slots} "
            "trajectories, and a group goes whole to one server; raise the engine's max_concurrency"
        )
    weight_transports(configuration.network)
    tasks = load_tasks(configuration.task, configuration.run.seed)
    load_function(configuration.task.reward, configuration.task.python_path)
    if configuration.evaluation.tasks > len(tasks.heldout):
        raise ConfigError(
            f"evaluation.tasks: is {configuration.evaluation.tasks}, but there are {len(tasks.heldout)} held-out tasks"
        )


def _check_model(directory: Path) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        if not (directory / name).is_file():
            raise ConfigError(f"model.path: {directory} is not a Hugging Face model with its tokenizer: no {name}")


def _fixed_address(address: str) -> str:
    host, _, port = address.rpartition(":")
    return address if int(port) else f"{host}:{free_port(host)}"
