"""The engines by name: how each is configured and started. A new engine is an options model and a line in `ENGINES`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, field_validator

from leeway.config.document import ConfigProgram, Options

ComputeType = Literal["float32", "bfloat16"]


class EngineOptions(Options):
    """What every engine is told: how much it decodes at once, and what it records."""

    max_concurrency: int = Field(default=96, ge=1, le=65536, description="Most sequences that are decoded at once.")
    max_queued: int = Field(
        default=4096, ge=0, description="Requests that may wait to be decoded; more than these are refused."
    )
    chunk_tokens: int = Field(
        default=16, ge=1, description="Sampled tokens of a sequence per streamed chunk, at least."
    )
    max_topk: int = Field(default=20, ge=0, le=1024, description="Largest K whose log-probs can be recorded.")


class ArithmeticEngineOptions(EngineOptions):
    """[inference_server.arithmetic]: an engine that samples by a formula, to rehearse the protocol without a model."""

    token_seconds: float = Field(default=0.0, ge=0, le=60, description="Simulated time of one decode step.")
    late_columns: bool = Field(
        default=False, description="Send version spans and routing only at the end, as vLLM and SGLang do."
    )
    max_topk: int = Field(default=20, ge=0, le=20, description="Largest K whose log-probs can be recorded.")


class ModelEngineOptions(EngineOptions):
    """What every engine with a model is told."""

    context_length: int | None = Field(
        default=None, ge=2, description="Longest sequence, prompt included. Unset: the model's own limit."
    )
    dtype: ComputeType = Field(default="float32", description="Element type that the engine computes in.")


class TransformersEngineOptions(ModelEngineOptions):
    """[inference_server.transformers]: the engine built on Hugging Face transformers."""

    num_threads: int = Field(default=1, ge=1, le=1024, description="PyTorch threads of the decode loop.")
    prefill_tokens: int = Field(
        default=4096, ge=1, description="Most prompt tokens, padding included, in one forward pass."
    )
    experts_implementation: Literal["eager", "grouped_mm", "batched_mm"] = Field(
        default="grouped_mm", description="How transformers multiplies by experts; a dense model ignores it."
    )
    command_timeout_seconds: float = Field(
        default=60.0, gt=0, description="Longest wait for the decode loop to finish its current step."
    )


class ProcessEngineOptions(ModelEngineOptions):
    """What every engine with processes and an environment of its own is told."""

    python: ConfigProgram | None = Field(
        default=None, description="Python interpreter of the environment that has the engine. Unset: Leeway's own."
    )
    max_concurrency: int = Field(
        default=64, ge=1, le=65536, description="Most sequences that are decoded at once, when memory allows."
    )
    dtype: ComputeType = Field(default="bfloat16", description="Element type that the engine computes in.")
    kv_on_update: Literal["keep", "recompute"] = Field(
        default="keep",
        description="On new weights, running sequences keep the keys and values of the old weights, or recompute them.",
    )
    tensor_parallel_size: int = Field(default=1, ge=1, description="Devices that share one copy of the model.")
    staging_directory: Path = Field(
        default=Path("/dev/shm"),  # noqa: S108 (a configured place for one file, made exclusively)
        strict=False,
        description="Folder that holds new weights until they are swapped in; it needs room for one copy.",
    )
    command_timeout_seconds: float = Field(
        default=300.0, gt=0, description="Longest wait for the engine to pause, to swap weights or to resume."
    )


OWN_VLLM_ARGUMENTS: Final = frozenset(
    {
        "disable_log_stats",
        "dtype",
        "enable_prefix_caching",
        "enable_return_routed_experts",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "logprobs_mode",
        "max_logprobs",
        "max_model_len",
        "max_num_seqs",
        "model",
        "skip_tokenizer_init",
        "speculative_config",
        "tensor_parallel_size",
        "trust_remote_code",
        "worker_cls",
        "worker_extension_cls",
    }
)
"""Arguments of vLLM that Leeway sets itself, or that would make its log-probs or routing untrue."""


class VllmEngineOptions(ProcessEngineOptions):
    """[inference_server.vllm]: the engine built on vLLM."""

    kv_cache_bytes: int | None = Field(
        default=None,
        ge=1 << 20,
        description="Memory for keys and values. Unset: what gpu_memory_utilization leaves.",
    )
    gpu_memory_utilization: float = Field(
        default=0.9, gt=0, le=1, description="Fraction of a device's memory that vLLM may use."
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="Further arguments of vLLM's AsyncEngineArgs, by name."
    )

    @field_validator("arguments")
    @classmethod
    def _not_own(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        taken = sorted(OWN_VLLM_ARGUMENTS & arguments.keys())
        if taken:
            raise ValueError(
                f"{', '.join(taken)}: set by Leeway; use the key of [inference_server.vllm] where there is one"
            )
        return arguments


class SglangEngineOptions(ProcessEngineOptions):
    """[inference_server.sglang]: the engine built on SGLang."""

    max_cached_tokens: int | None = Field(
        default=None, ge=1, description="Tokens whose keys and values are kept in memory. Unset: SGLang decides."
    )
    start_timeout_seconds: float = Field(
        default=1800.0, gt=0, description="Longest wait for SGLang to load the model and answer."
    )
    arguments: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(), strict=False, description="Further arguments of sglang.launch_server, as on its command line."
    )


@dataclass(frozen=True, slots=True)
class EngineEntry:
    """An engine that a configuration may name.

    Args:
        options: model of its section, [inference_server.NAME].
        start: "module:function", called as `await function(model directory, options)`; it returns the engine.
        library: what its own environment has and Leeway's need not; its options then name an interpreter.
        rehearsal: whether it samples by a formula, without a model.
    """

    options: type[EngineOptions]
    start: str
    library: str | None = None
    rehearsal: bool = False


ENGINES: Final[dict[str, EngineEntry]] = {
    "transformers": EngineEntry(TransformersEngineOptions, "inference_server.engines.transformers.engine:start"),
    "vllm": EngineEntry(VllmEngineOptions, "inference_server.engines.vllm.engine:start", library="vllm"),
    "sglang": EngineEntry(SglangEngineOptions, "inference_server.engines.sglang.engine:start", library="sglang"),
    "arithmetic": EngineEntry(ArithmeticEngineOptions, "inference_server.engines.arithmetic:start", rehearsal=True),
}
