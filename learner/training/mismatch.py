"""What engine and learner disagree about with the same weights: the mean divergence of tokens of staleness zero."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RunningMismatch:
    """A mean over tokens in which a step counts 1 - 1 / memory as much as the one after it.

    Steps without tokens of staleness zero change nothing, so a run that is always stale keeps what it last knew.
    """

    total: float = 0.0
    tokens: float = 0.0

    @property
    def mean(self) -> float:
        """0 until something was measured."""
        return self.total / self.tokens if self.tokens else 0.0

    def after(self, total: float, tokens: float, memory_steps: int) -> RunningMismatch:
        """With one more step's sum of divergences and number of tokens.

        Example:
            memory 2: 10 tokens of .1, then 10 of .4: (.5 + 4) / (5 + 10) = .3.
        """
        if not tokens:
            return self
        decay = 1 - 1 / memory_steps
        return RunningMismatch(decay * self.total + total, decay * self.tokens + tokens)
