"""The inference servers: the engine, and the rollout worker that feeds a run from it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import AfterValidator, Field, create_model

from leeway.config.document import Address, Options, Registered
from leeway.config.engines import ENGINES, EngineOptions, ProcessEngineOptions
from leeway.errors import ConfigError


class WorkerOptions(Options):
    """[inference_server.worker]: how a rollout worker takes tickets and samples their trajectories."""

    prefetch: int = Field(
        default=16,
        ge=0,
        le=65536,
        description="Trajectories taken on beyond what the engine decodes at once, so that it never idles.",
    )
    ticket_wait_seconds: float = Field(
        default=2.0, gt=0, le=60, description="Longest wait of one request for tickets at the replay buffer."
    )
    trajectory_timeout_seconds: float = Field(
        default=1800.0, gt=0, description="Longest generation of one trajectory, its wait for the engine included."
    )
    drain_seconds: float = Field(
        default=4.0, ge=0, le=60, description="Longest wait for the last acknowledgements when the server stops."
    )
    routing_rows: int = Field(
        default=8192,
        ge=0,
        le=65536,
        description="Tokens of a trajectory whose routing is held back, to be packed together. 0 sends plain expert "
        "ids as they come.",
    )


class WriterOptions(Options):
    """[inference_server.writer]: the stream of trajectories to the replay buffer."""

    window_items: int = Field(
        default=4096, ge=1, description="Most writes without an acknowledgement; further writes wait."
    )
    window_bytes: int = Field(
        default=64 << 20, ge=1, description="Most bytes without an acknowledgement; further writes wait."
    )
    batch_items: int = Field(default=256, ge=1, le=65536, description="Writes that are sent without waiting for more.")
    batch_bytes: int = Field(
        default=1 << 20, ge=1, le=32 << 20, description="Bytes that are sent without waiting for more."
    )
    flush_seconds: float = Field(
        default=0.005, ge=0, le=1, description="How long a write waits for others that are sent with it."
    )
    answer_timeout_seconds: float = Field(
        default=60.0, gt=0, description="Wait for an acknowledgement after which the stream is opened again."
    )
    patience_seconds: float = Field(
        default=600.0, gt=0, description="Time without any acknowledgement after which the server gives up."
    )
    exhausted_wait_seconds: float = Field(
        default=2.0, ge=0, description="Wait before a retry when the replay buffer has no room and names no time."
    )


class RewardOptions(Options):
    """[inference_server.reward]: how the reward function is called."""

    timeout_seconds: float = Field(
        default=30.0, gt=0, description="Longest call of the reward function; a longer one fails the trajectory."
    )
    processes: int = Field(
        default=2,
        ge=1,
        le=256,
        description="Worker processes that call the reward function. Each runs one call of a plain function at a time.",
    )
    concurrency: int = Field(
        default=8, ge=1, le=4096, description="Calls of an async reward function at the same time, in all processes."
    )
    memory_bytes: int = Field(
        default=4 << 30,
        ge=64 << 20,
        description="Memory that one worker process may allocate; a call that needs more fails the trajectory.",
    )


EngineName = Annotated[str, AfterValidator(Registered("engine", ENGINES))]

_engine_sections: dict[str, Any] = {name: (entry.options, entry.options()) for name, entry in ENGINES.items()}
_Engines = create_model("_Engines", __base__=Options, **_engine_sections)


class InferenceServerOptions(_Engines):
    """[inference_server]: the engine, and how its rollout worker feeds the run."""

    engine: EngineName = Field(
        default="transformers", description="Engine that samples; arithmetic rehearses the protocol without a model."
    )
    engines: tuple[EngineName, ...] = Field(
        default=(), strict=False, description="Engine of each server, where they differ. Unset: `engine` for all."
    )
    backends: tuple[Address, ...] = Field(
        default=(),
        strict=False,
        description="Addresses of foreign InferenceServices that sample, one per server; `engine` then still names the "
        "tokenizer. Unset: the servers sample themselves.",
    )
    take_deltas: bool = Field(
        default=True,
        description="Keep the newest weights in host memory, so that an update brings only what has changed.",
    )
    fetch_timeout_seconds: float = Field(default=600.0, gt=0, description="Longest transfer of one version's weights.")
    worker: WorkerOptions = WorkerOptions()
    writer: WriterOptions = WriterOptions()
    reward: RewardOptions = RewardOptions()

    def engine_of(self, index: int) -> str:
        """The engine of the server with an index.

        Raises:
            ConfigError: `engines` names none for it.
        """
        if self.engines and index >= len(self.engines):
            raise ConfigError(f"inference_server.engines: names {len(self.engines)} engines, none for server {index}")
        return self.engines[index] if self.engines else self.engine

    def options_of(self, engine: str) -> EngineOptions:
        """An engine's own section."""
        return cast("EngineOptions", getattr(self, engine))

    def python_of(self, engine: str) -> Path | None:
        """The interpreter of an engine with an environment of its own, where one is named."""
        options = self.options_of(engine)
        return options.python if isinstance(options, ProcessEngineOptions) else None
