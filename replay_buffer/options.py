"""The [replay_buffer] section."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import Field, model_validator

from leeway.config import ConfigPath, Document, Options, RunOptions, section

MIB = 1 << 20


class ReplayBufferOptions(Options):
    """[replay_buffer]: where the log lives, how long loans last, what happens when the disk fills up."""

    directory: ConfigPath = Field(description="folder of the durable log; RUN/replay unless set; one process at a time")
    lease_seconds: float = Field(
        default=30.0, gt=0, le=3600, description="silence after which a server's groups may be lent to another"
    )
    segment_bytes: int = Field(
        default=64 * MIB, ge=1 * MIB, le=1024 * MIB, description="size at which the log goes on in a new file"
    )
    soft_free_bytes: int = Field(
        default=512 * MIB, ge=0, description="with less free space than this, no new work is given out"
    )
    hard_free_bytes: int = Field(
        default=128 * MIB,
        ge=0,
        description="with less free space than this, no chunks are taken; the rest is kept for control records",
    )
    slow_pending_bytes: int = Field(
        default=64 * MIB,
        ge=1,
        description="received but not yet durable bytes beyond which streams are not read, which slows their writers",
    )
    max_pending_bytes: int = Field(
        default=256 * MIB,
        ge=1,
        description="bound of such bytes, beyond which writers are refused and told when to return",
    )
    hold_seconds: float = Field(
        default=10.0, gt=0, le=600, description="longest wait of a call for a disk that takes nothing"
    )
    retry_seconds: float = Field(
        default=2.0, gt=0, le=600, description="when a caller that was refused for want of room is told to return"
    )
    disk_retry_seconds: float = Field(
        default=1.0, gt=0, le=60, description="time between two attempts to write to a full disk"
    )
    retain_bytes: int | None = Field(
        default=None,
        ge=0,
        description="size of the log beyond which its oldest segments are deleted, unless something live or a kept "
        "checkpoint needs them; 0 deletes what nothing needs, unset keeps everything",
    )
    retain_seconds: float | None = Field(
        default=None,
        ge=0,
        description="age beyond which segments are deleted that nothing needs; unset: none is too old",
    )
    stop_seconds: float = Field(default=3.0, ge=0, le=60, description="time that calls in flight get at a clean stop")

    @model_validator(mode="after")
    def _marks_in_order(self) -> ReplayBufferOptions:
        if self.hard_free_bytes > self.soft_free_bytes:
            raise ValueError("hard_free_bytes must not be above soft_free_bytes")
        if self.slow_pending_bytes > self.max_pending_bytes:
            raise ValueError("slow_pending_bytes must not be above max_pending_bytes")
        if self.retain_bytes and self.retain_bytes < 2 * self.segment_bytes:
            raise ValueError("retain_bytes must be 0 or at least 2 * segment_bytes: whole segments are deleted")
        return self


def read_options(document: Document) -> ReplayBufferOptions:
    """The section; the log lies in the run's folder unless it says where.

    Raises:
        ConfigError: naming file and key.
    """
    given: Mapping[str, Any] = document.values.get("replay_buffer", {})
    if "directory" not in given:
        run = section(document, "run", RunOptions)
        given = {**given, "directory": str(run.run_directory / "replay")}
    with_directory = replace(document, values={**document.values, "replay_buffer": given})
    return section(with_directory, "replay_buffer", ReplayBufferOptions)
