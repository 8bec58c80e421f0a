"""Options of the vLLM engine; readable without vLLM and torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field, field_validator

from leeway.config import ConfigProgram, Options

OWN_ARGUMENTS: Final = frozenset(
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
"""Arguments of vLLM that the adapter sets itself, or that would make its log-probs or routing untrue."""


class VllmEngineOptions(Options):
    """How the vLLM engine is started and decodes."""

    python: ConfigProgram | None = Field(
        default=None, description="interpreter of the environment that has vLLM; unset takes the one that runs Leeway"
    )
    max_concurrency: int = Field(
        default=64, ge=1, le=65536, description="sequences decoded at once, when memory allows"
    )
    max_queued: int = Field(default=4096, ge=0, description="requests that may wait for a slot; more are refused")
    context_length: int | None = Field(
        default=None, ge=2, description="longest sequence, prompt included; unset takes the model's own"
    )
    dtype: Literal["float32", "bfloat16"] = Field(default="bfloat16", description="element type to compute in")
    chunk_tokens: int = Field(default=16, ge=1, description="sampled tokens of a sequence per streamed chunk, at least")
    max_topk: int = Field(default=20, ge=0, le=1024, description="largest K whose log-probs can be recorded")
    kv_on_update: Literal["keep", "recompute"] = Field(
        default="keep",
        description="running sequences keep keys and values of the old weights, or compute them again with the new",
    )
    kv_cache_bytes: int | None = Field(
        default=None,
        ge=1 << 20,
        description="memory for keys and values; unset takes what gpu_memory_utilization leaves",
    )
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1, description="share of a device's memory to use")
    tensor_parallel_size: int = Field(default=1, ge=1, description="devices that share one copy of the model")
    staging_directory: Path = Field(
        default=Path("/dev/shm"),  # noqa: S108 (a configured place for one file, made exclusively)
        strict=False,
        description="where new weights lie, whole, before they are swapped in; needs room for one copy",
    )
    command_timeout_seconds: float = Field(
        default=300.0, gt=0, description="longest wait for vLLM to pause, to swap weights or to go on"
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="further arguments of vLLM's AsyncEngineArgs, by name"
    )

    @field_validator("arguments")
    @classmethod
    def _not_own(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        taken = sorted(OWN_ARGUMENTS & arguments.keys())
        if taken:
            raise ValueError(
                f"{', '.join(taken)}: set by Leeway; use the key of [inference_server.vllm] where there is one"
            )
        return arguments
