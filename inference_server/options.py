"""The [inference_server] section; readable without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from inference_server.engines.arithmetic import ArithmeticEngineOptions
from inference_server.engines.sglang.options import SglangEngineOptions
from inference_server.engines.transformers.options import TransformersEngineOptions
from inference_server.engines.vllm.options import VllmEngineOptions
from inference_server.rollout.reward import RewardLimits
from inference_server.rollout.worker import WorkerLimits
from inference_server.rollout.write_window import WriterLimits
from leeway.config import Address, Options
from leeway.errors import ConfigError

EngineName = Literal["transformers", "vllm", "sglang", "arithmetic"]


class InferenceServerOptions(Options):
    """[inference_server]: the engine, and how its rollout worker feeds the run."""

    engine: EngineName = Field(
        default="transformers", description="what samples; arithmetic rehearses the protocol without a model"
    )
    engines: tuple[EngineName, ...] = Field(
        default=(),
        strict=False,
        description="the engine of each server, where they differ; unset takes `engine` for all",
    )
    backends: tuple[Address, ...] = Field(
        default=(),
        strict=False,
        description="foreign InferenceServices that sample, one per server; without any the servers sample themselves "
        "(`engine` then still names tokenizer and law)",
    )
    transformers: TransformersEngineOptions = TransformersEngineOptions()
    vllm: VllmEngineOptions = VllmEngineOptions()
    sglang: SglangEngineOptions = SglangEngineOptions()
    arithmetic: ArithmeticEngineOptions = ArithmeticEngineOptions()

    prefetch: int = Field(
        default=16, ge=0, le=65536, description="trajectories taken beyond what the engine decodes at once"
    )
    ticket_wait_seconds: float = Field(default=2.0, gt=0, le=60, description="longest wait of one call for tickets")
    trajectory_timeout_seconds: float = Field(
        default=1800.0, gt=0, description="longest generation of one trajectory, waiting for a slot included"
    )
    drain_seconds: float = Field(
        default=4.0, ge=0, le=60, description="longest wait for the last acknowledgements at the end"
    )
    routing_rows: int = Field(
        default=8192,
        ge=0,
        le=65536,
        description="tokens of a trajectory whose routing is held back to be packed; 0 writes plain expert ids",
    )

    reward_timeout_seconds: float = Field(default=30.0, gt=0, description="longest call of the reward function")
    reward_concurrency: int = Field(default=8, ge=1, le=4096, description="calls of the reward function at once")
    reward_max_hung: int = Field(
        default=16, ge=0, description="calls that may go on after their timeout; one more ends the server"
    )

    window_items: int = Field(default=4096, ge=1, description="writes without an acknowledgement; more wait")
    window_bytes: int = Field(default=64 << 20, ge=1, description="bytes without an acknowledgement; more wait")
    flush_seconds: float = Field(default=0.005, ge=0, le=1, description="how long a write waits for others to join it")
    batch_items: int = Field(default=256, ge=1, le=65536, description="writes that are sent without waiting longer")
    batch_bytes: int = Field(
        default=1 << 20, ge=1, le=32 << 20, description="bytes that are sent without waiting longer"
    )
    answer_timeout_seconds: float = Field(
        default=60.0, gt=0, description="wait for an acknowledgement after which the stream is opened again"
    )
    patience_seconds: float = Field(
        default=600.0, gt=0, description="time without any acknowledgement after which the server gives up"
    )

    take_deltas: bool = Field(
        default=True, description="hold the newest weights in host memory, so that a push brings only what changed"
    )
    fetch_timeout_seconds: float = Field(default=600.0, gt=0, description="longest transfer of one version's weights")

    def engine_of(self, index: int) -> EngineName:
        """The engine of the server with an index.

        Raises:
            ConfigError: `engines` names none for it.
        """
        if self.engines and index >= len(self.engines):
            raise ConfigError(f"inference_server.engines: names {len(self.engines)} engines, none for server {index}")
        return self.engines[index] if self.engines else self.engine

    def max_concurrency(self, engine: EngineName) -> int:
        """Most sequences that an engine decodes at once."""
        options = {
            "transformers": self.transformers,
            "vllm": self.vllm,
            "sglang": self.sglang,
            "arithmetic": self.arithmetic,
        }
        return options[engine].max_concurrency

    def python(self, engine: EngineName) -> Path | None:
        """The interpreter of an engine with an environment of its own, where it has one."""
        match engine:
            case "vllm":
                return self.vllm.python
            case "sglang":
                return self.sglang.python
            case "transformers" | "arithmetic":
                return None

    def worker_limits(self) -> WorkerLimits:
        """Bounds of the worker."""
        return WorkerLimits(
            prefetch=self.prefetch,
            ticket_wait_seconds=self.ticket_wait_seconds,
            trajectory_timeout_seconds=self.trajectory_timeout_seconds,
            drain_seconds=self.drain_seconds,
            routing_rows=self.routing_rows,
        )

    def writer_limits(self) -> WriterLimits:
        """Bounds of the stream to the replay buffer."""
        return WriterLimits(
            max_items=self.window_items,
            max_bytes=self.window_bytes,
            batch_bytes=self.batch_bytes,
            batch_items=self.batch_items,
            flush_seconds=self.flush_seconds,
            answer_timeout_seconds=self.answer_timeout_seconds,
            patience_seconds=self.patience_seconds,
        )

    def reward_limits(self) -> RewardLimits:
        """Bounds of the reward function."""
        return RewardLimits(
            timeout_seconds=self.reward_timeout_seconds,
            concurrency=self.reward_concurrency,
            max_hung=self.reward_max_hung,
        )
