"""Policy versions, models, engines, published weights and the deltas between them."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field


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


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a published version."""

    name: str
    dtype: str  # "bfloat16", "float32", ...
    shape: tuple[int, ...]
    digest: bytes  # SHA-256 of its bytes
    size_bytes: int


@dataclass(frozen=True, slots=True)
class WeightManifest:
    """The tensors of a published version, ordered by name."""

    tensors: tuple[TensorEntry, ...]

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.tensors)


@dataclass(frozen=True, slots=True)
class WeightSnapshot:
    """Published weights: little-endian bytes per tensor, in manifest order."""

    version: PolicyVersion
    publisher_epoch: int
    manifest: WeightManifest
    buffers: Sequence[bytes | memoryview] = field(repr=False)


@dataclass(frozen=True, slots=True)
class WeightDelta:
    """A payload that leads from one published version to another."""

    base_digest: bytes
    target_digest: bytes
    digest: bytes  # SHA-256 of the payload
    size_bytes: int


@dataclass(frozen=True, slots=True)
class WeightRequest:
    """Parts [first_part, end_part) of a version: its tensors, or the deltas that lead to it from `base_digest`."""

    version: PolicyVersion
    base_digest: bytes = b""  # empty: tensors
    first_part: int = 0
    end_part: int = 0  # 0: all that follow
