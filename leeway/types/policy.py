"""Policy versions, models and engines."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class LogprobMode(enum.IntEnum):
    """The distribution that the behavior log-probs come from."""

    SAMPLED = 1
    RAW = 2


@dataclass(frozen=True, slots=True)
class PolicyVersion:
    """The identity of one set of weights; never reused."""

    run: str
    epoch: int  # the learner incarnation that made it; 0 for the run's first weights
    step: int  # optimizer steps along its own history
    digest: bytes  # SHA-256 of the published weights

    def __str__(self) -> str:
        return f"{self.run}/{self.epoch}.{self.step}@{self.digest.hex()[:8]}"


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Tokens [start_token, end_token) were sampled by `version`."""

    start_token: int
    end_token: int
    version: PolicyVersion


@dataclass(frozen=True, slots=True)
class ModelSignature:
    """The properties in which two models must agree to be exchangeable for a run."""

    model_digest: bytes
    tokenizer_digest: bytes
    vocab_size: int
    moe_layers: int  # 0 for a dense model, as are the next two
    experts: int
    experts_per_token: int
    context_length: int


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """An engine's description of itself."""

    signature: ModelSignature
    engine: str  # "name/version"
    logprob_mode: LogprobMode
    version: PolicyVersion | None
    max_topk: int
    routing: bool
    max_concurrency: int
