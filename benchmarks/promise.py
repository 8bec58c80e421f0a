"""A figure that a benchmark holds against its target."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Promise:
    """One figure and its target."""

    what: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def kept(self) -> bool:
        """Whether the figure reaches the target."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        return f"{'kept    ' if self.kept else 'NOT kept'} {self.value:9.3g} {sign} {self.limit:<6.3g} {self.what}"
