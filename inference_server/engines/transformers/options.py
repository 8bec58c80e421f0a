"""Options of the transformers engine; readable without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from leeway.config import Options


class TransformersEngineOptions(Options):
    """How the transformers engine decodes."""

    max_concurrency: int = Field(default=96, ge=1, le=65536, description="sequences decoded at once")
    max_queued: int = Field(default=4096, ge=0, description="requests that may wait for a slot; more are refused")
    context_length: int | None = Field(
        default=None, ge=2, description="longest sequence, prompt included; unset takes the model's own"
    )
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="element type to compute in")
    num_threads: int = Field(default=1, ge=1, le=1024, description="torch threads of the decode loop")
    chunk_tokens: int = Field(default=16, ge=1, description="sampled tokens of a sequence per streamed chunk")
    prefill_tokens: int = Field(default=4096, ge=1, description="most prompt tokens, padding included, in one forward")
    max_topk: int = Field(default=20, ge=0, le=1024, description="largest K whose log-probs can be recorded")
    experts_implementation: Literal["eager", "grouped_mm", "batched_mm"] = Field(
        default="grouped_mm", description="how transformers multiplies by experts; without effect on a dense model"
    )
    command_timeout_seconds: float = Field(
        default=60.0, gt=0, description="longest wait for the decode loop to reach the end of a step"
    )
