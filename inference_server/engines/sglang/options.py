"""Options of the SGLang engine; readable without SGLang and torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from inference_server.engines.process_options import ProcessEngineOptions


class SglangEngineOptions(ProcessEngineOptions):
    """How SGLang's server is started and decodes."""

    max_cached_tokens: int | None = Field(
        default=None, ge=1, description="tokens with keys and values in memory; unset takes what SGLang finds"
    )
    start_timeout_seconds: float = Field(
        default=1800.0, gt=0, description="longest wait for SGLang to load the model and answer"
    )
    arguments: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(), strict=False, description="further arguments of sglang.launch_server, as on its command line"
    )
