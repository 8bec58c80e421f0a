"""Options of the vLLM engine; readable without vLLM and torch."""

from __future__ import annotations

from typing import Any, Final

from pydantic import Field, field_validator

from inference_server.engines.process_options import ProcessEngineOptions

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


class VllmEngineOptions(ProcessEngineOptions):
    """How the vLLM engine is started and decodes."""

    kv_cache_bytes: int | None = Field(
        default=None,
        ge=1 << 20,
        description="memory for keys and values; unset takes what gpu_memory_utilization leaves",
    )
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1, description="share of a device's memory to use")
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
