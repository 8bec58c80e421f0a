"""A run's whole configuration, read and checked by one function for `leeway run`, every service and every `--check`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import tomli_w
from pydantic import PrivateAttr, ValidationError, model_validator

from leeway.config.document import Document, Options, explain, load_document
from leeway.config.inference_server import InferenceServerOptions
from leeway.config.learner import LearnerOptions
from leeway.config.network import MetricsOptions, NetworkOptions
from leeway.config.replay_buffer import ReplayBufferOptions
from leeway.config.rules import refusal
from leeway.config.run import EvaluationOptions, ModelOptions, RunOptions, SamplingOptions, TaskOptions
from leeway.errors import ConfigError
from leeway.service.ports import free_port


class RunConfiguration(Options):
    """One field per section of the file."""

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
    _file: Path = PrivateAttr(Path())

    @model_validator(mode="before")
    @classmethod
    def _every_section(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Sections that are not in the file are empty; the log lies in the run's folder unless the file says where."""
        sections: dict[str, Any] = dict.fromkeys(cls.model_fields, cast("Any", {}))
        sections |= values
        run: Any = sections["run"]
        replay_buffer: Any = sections["replay_buffer"]
        if isinstance(run, Mapping) and isinstance(replay_buffer, Mapping):
            named = cast("Mapping[str, Any]", run)
            log = f"{named.get('directory', 'runs')}/{named.get('name')}/replay"
            sections["replay_buffer"] = {"directory": log, **cast("Mapping[str, Any]", replay_buffer)}
        return sections

    def model_post_init(self, context: Any) -> None:  # noqa: ANN401 (as pydantic declares it)
        if context:
            self._file = context["file"]

    def refused(self, line: str) -> ConfigError:
        """The error of a configuration that cannot be used, with the file's name."""
        return ConfigError(f"{self._file}: {line}")

    def engine_names(self) -> frozenset[str]:
        """The engines of the configured servers; `inference_server.engine` where none is configured."""
        servers = self.inference_server
        names = frozenset(map(servers.engine_of, range(len(self.network.inference_servers))))
        return names or frozenset({servers.engine})

    def with_free_ports(self) -> RunConfiguration:
        """Port 0 replaced by a free port, everywhere."""
        network, metrics = self.network, self.metrics
        return self.model_copy(
            update={
                "network": network.model_copy(
                    update={
                        "replay_buffer": _fixed_address(network.replay_buffer),
                        "policy": _fixed_address(network.policy),
                        "inference_servers": tuple(map(_fixed_address, network.inference_servers)),
                    }
                ),
                "metrics": metrics.model_copy(
                    update={
                        "replay_buffer": metrics.replay_buffer or free_port(metrics.host),
                        "learner": metrics.learner or free_port(metrics.host),
                        "inference_servers": tuple(p or free_port(metrics.host) for p in metrics.inference_servers),
                    }
                ),
            }
        )

    def write(self, path: Path) -> None:
        """Save it as TOML that `load_configuration` reads back; unset optional keys are left out."""
        path.write_text(tomli_w.dumps(self.model_dump(mode="json", exclude_none=True)), encoding="utf-8")


def load_configuration(path: Path, overrides: Sequence[str] = ()) -> RunConfiguration:
    """Read a file with `section.key=value` overrides, and check all of it that can be checked without opening anything.

    Raises:
        ConfigError: naming file and key, what is wrong, and what was given.
    """
    return read_configuration(load_document(path, overrides))


def read_configuration(document: Document) -> RunConfiguration:
    """Check every key, every section, and every rule across sections.

    Raises:
        ConfigError: naming file and key, what is wrong, and what was given.
    """
    try:
        configuration = RunConfiguration.model_validate(document.values, context={"file": document.path})
    except ValidationError as error:
        raise ConfigError(explain(document.path, error)) from error
    refused = refusal(configuration)
    if refused is not None:
        raise configuration.refused(refused)
    return configuration


def _fixed_address(address: str) -> str:
    host, _, port = address.rpartition(":")
    return address if int(port) else f"{host}:{free_port(host)}"
