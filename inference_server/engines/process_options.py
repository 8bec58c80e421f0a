"""Options that engines with processes of their own share; readable without any engine."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from leeway.config import ConfigProgram, Options


class ProcessEngineOptions(Options):
    """How an engine with processes of its own is given requests and weights."""

    python: ConfigProgram | None = Field(
        default=None, description="interpreter of the environment that has the engine; unset takes Leeway's own"
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
    tensor_parallel_size: int = Field(default=1, ge=1, description="devices that share one copy of the model")
    staging_directory: Path = Field(
        default=Path("/dev/shm"),  # noqa: S108 (a configured place for one file, made exclusively)
        strict=False,
        description="where new weights lie, whole, before they are swapped in; needs room for one copy",
    )
    command_timeout_seconds: float = Field(
        default=300.0, gt=0, description="longest wait for the engine to pause, to swap weights or to go on"
    )
