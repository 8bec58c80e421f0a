"""[learner.fleet]: when a server is taken out of the run."""

from __future__ import annotations

from pydantic import Field

from leeway.config import Options


class FleetOptions(Options):
    """Which servers diverge or are slow; docs/fleet.md says how both are measured."""

    drain: bool = Field(
        default=True, description="take such servers out of the run; false only names them, in log and metrics"
    )
    max_excess_nats: float = Field(
        default=0.2,
        gt=0,
        le=100,
        description="a server diverges when its mean |log pi - log mu| surely exceeds the others' by more than this",
    )
    min_tokens: int = Field(default=2000, ge=1, description="fewest tokens of a server that are judged")
    window_steps: int = Field(default=20, ge=1, le=10_000, description="newest steps whose tokens count")
    slow_ratio: float | None = Field(
        default=20.0,
        ge=2,
        description="a server is slow when its median group takes this many times the others' time; unset: none is",
    )
    slow_seconds: float = Field(default=60.0, ge=0, description="and at least this long")
    min_loans: int = Field(default=16, ge=1, le=32, description="fewest groups of a server whose median is compared")
    check_seconds: float = Field(
        default=10.0, gt=0, le=3600, description="longest time between two looks at the servers; each step brings one"
    )
