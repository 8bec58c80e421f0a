"""The replay buffer: where its log lies, how long leases last, what happens when the disk fills up."""

from __future__ import annotations

from pydantic import Field, model_validator

from leeway.config.document import ConfigPath, Options

MIB = 1 << 20


class ReplayBufferOptions(Options):
    """[replay_buffer]: where the log lies, how long leases last, what happens when the disk fills up."""

    directory: ConfigPath = Field(
        description="Folder of the durable log, which one process holds at a time. Unset: the run's folder + /replay."
    )
    lease_seconds: float = Field(
        default=30.0,
        gt=0,
        le=3600,
        description="Silence of a server after which its groups may be given to another server.",
    )
    segment_bytes: int = Field(
        default=64 * MIB, ge=1 * MIB, le=1024 * MIB, description="Size at which the log continues in a new file."
    )
    soft_free_bytes: int = Field(
        default=512 * MIB, ge=0, description="With less free space on the disk than this, no new tickets are granted."
    )
    hard_free_bytes: int = Field(
        default=128 * MIB,
        ge=0,
        description="With less free space than this, no trajectory data is accepted; the rest is kept for control "
        "records.",
    )
    slow_pending_bytes: int = Field(
        default=64 * MIB,
        ge=1,
        description="Received bytes that are not yet durable, beyond which streams are read no further, so that their "
        "writers slow down.",
    )
    max_pending_bytes: int = Field(
        default=256 * MIB,
        ge=1,
        description="Received bytes that are not yet durable, beyond which writers are refused and told when to retry.",
    )
    hold_seconds: float = Field(
        default=10.0, gt=0, le=600, description="Longest wait of a call for a disk that accepts nothing."
    )
    retry_seconds: float = Field(
        default=2.0, gt=0, le=600, description="Time after which a caller that was refused for lack of room may retry."
    )
    disk_retry_seconds: float = Field(
        default=1.0, gt=0, le=60, description="Time between two attempts to write to a full disk."
    )
    retain_bytes: int | None = Field(
        default=None,
        ge=0,
        description="Size of the log beyond which its oldest segments are deleted, unless a live group or a kept "
        "checkpoint needs them. 0 deletes whatever nothing needs; unset keeps everything.",
    )
    retain_seconds: float | None = Field(
        default=None,
        ge=0,
        description="Age beyond which segments that nothing needs are deleted. Unset: no segment is too old.",
    )
    stop_seconds: float = Field(
        default=3.0, ge=0, le=60, description="Time that calls in progress get when the replay buffer stops."
    )

    @model_validator(mode="after")
    def _marks_in_order(self) -> ReplayBufferOptions:
        if self.hard_free_bytes > self.soft_free_bytes:
            raise ValueError("hard_free_bytes must not be above soft_free_bytes")
        if self.slow_pending_bytes > self.max_pending_bytes:
            raise ValueError("slow_pending_bytes must not be above max_pending_bytes")
        if self.retain_bytes and self.retain_bytes < 2 * self.segment_bytes:
            raise ValueError("retain_bytes must be 0 or at least 2 * segment_bytes: whole segments are deleted")
        return self
