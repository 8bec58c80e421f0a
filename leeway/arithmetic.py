"""A model without a model: the law by which the arithmetic engine samples and the rehearsal trainer publishes.

The weights of a version are one int64 tensor [history, step, 0, ...], and the distribution of the next token depends on
the digest of the published weights and on the prefix's length and last token. The digest is part of every version's
name, so the label of a token is enough to recompute the log-probability that it was sampled with, and a protocol test
knows of every token whether its label tells the truth.

With V token ids, h a 64-bit hash of (digest, prefix length, last token), temperature T:

    favoured token     f = h mod V
    its probability    q = 0.05 + 0.9 u,   u in [0, 1) from the bits of h
    any other token    (1 - q) / (V - 1)
    at temperature T   p_i^(1/T) / sum_j p_j^(1/T)

Needs NumPy only.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from leeway.errors import PreconditionError
from leeway.service.seeds import GAMMA, MASK_64, mix64
from leeway.types import ModelSignature, PolicyVersion, WeightManifest
from leeway.weights.digests import tensor_entry, weights_digest

END_OF_SEQUENCE: Final = 0
"""The token id that ends a completion."""

_ALPHABET: Final = " 0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_TENSOR_NAME: Final = "arithmetic.weight"
_WEIGHT_ELEMENTS: Final = 256

SIGNATURE: Final = ModelSignature(
    model_digest=hashlib.sha256(b"leeway arithmetic model 1").digest(),
    tokenizer_digest=hashlib.sha256(b"leeway arithmetic tokenizer 1\0" + _ALPHABET.encode()).digest(),
    vocab_size=1 + len(_ALPHABET),
    moe_layers=2,
    experts=8,
    experts_per_token=2,
    context_length=4096,
)
"""The signature with which a run on this law is opened."""


@dataclass(frozen=True, slots=True)
class ArithmeticWeights:
    """A policy version as the law sees it: 64 bits of the digest of its weights."""

    key: int

    @classmethod
    def of(cls, version: PolicyVersion) -> ArithmeticWeights:
        """The weights that a label names."""
        return _of_digest(version.digest)


@dataclass(frozen=True, slots=True)
class Distribution:
    """The next token's distribution: one favoured token, all others alike."""

    favoured: int
    favoured_logprob: float
    other_logprob: float

    def logprob(self, token_id: int) -> float:
        """Log-probability of a token."""
        return self.favoured_logprob if token_id == self.favoured else self.other_logprob

    def top(self, count: int) -> list[int]:
        """The `count` likeliest token ids, likeliest first; ties in order of id."""
        others = [token_id for token_id in range(count) if token_id != self.favoured]
        return [self.favoured, *others, count][:count]


def next_distribution(
    weights: ArithmeticWeights, length: int, last_token: int, temperature: float = 1.0
) -> Distribution:
    """The distribution of the token that follows `length` tokens, the last of which is `last_token`."""
    bits = _hash(weights.key, length, last_token)
    others = SIGNATURE.vocab_size - 1
    favoured = 0.05 + 0.9 * (bits >> 11) * 2.0**-53
    other = (1.0 - favoured) / others
    if temperature != 1.0:
        favoured, other = favoured ** (1.0 / temperature), other ** (1.0 / temperature)
        total = favoured + others * other
        favoured, other = favoured / total, other / total
    return Distribution(bits % SIGNATURE.vocab_size, math.log(favoured), math.log(other))


def sample(distribution: Distribution, length: int, seed: int) -> tuple[int, float]:
    """Draw from a distribution: (token id, its log-probability). Depends on seed and position only."""
    bits = _hash(seed, length, 0x5A3)
    if (bits >> 11) * 2.0**-53 < math.exp(distribution.favoured_logprob):
        return distribution.favoured, distribution.favoured_logprob
    token_id = (distribution.favoured + 1 + mix64(bits) % (SIGNATURE.vocab_size - 1)) % SIGNATURE.vocab_size
    return token_id, distribution.other_logprob


def routing_row(weights: ArithmeticWeights, position: int, token_id: int) -> list[list[int]]:
    """Experts that token `token_id` at `position` is sent to: [layers][k], distinct within a layer.

    A token is routed when it is fed, under the version that samples the next token: row i of a trajectory belongs to
    the label of token i + 1, and the rows of the prompt to that of the first sampled token.
    """
    experts = SIGNATURE.experts
    rows: list[list[int]] = []
    for layer in range(SIGNATURE.moe_layers):
        bits = _hash(weights.key, (position << 8) | layer, token_id)
        # An odd stride visits distinct experts, their number being a power of two.
        start, stride = bits % experts, 1 + 2 * ((bits >> 16) % (experts // 2))
        rows.append([(start + slot * stride) % experts for slot in range(SIGNATURE.experts_per_token)])
    return rows


def published_weights(history: int, step: int) -> tuple[WeightManifest, list[bytes]]:
    """The weights of a version as they are published: manifest and each tensor's bytes.

    Args:
        history: stands for everything that was learned; below 2^63.
        step: optimizer steps.
    """
    tensor = np.zeros(_WEIGHT_ELEMENTS, dtype="<i8")
    tensor[:2] = history, step
    data = tensor.tobytes()
    return _manifest(data), [data]


def read_weights(manifest: WeightManifest, buffers: Sequence[bytes | memoryview]) -> ArithmeticWeights:
    """The weights in these bytes, whatever version they were announced as.

    Raises:
        PreconditionError: the manifest is not that of this law.
    """
    expected = [(_TENSOR_NAME, "int64", (_WEIGHT_ELEMENTS,))]
    if [(entry.name, entry.dtype, entry.shape) for entry in manifest.tensors] != expected:
        raise PreconditionError(
            f"the published weights do not fit the arithmetic model, which has one int64 tensor {_TENSOR_NAME} "
            f"of {_WEIGHT_ELEMENTS} elements; serve the model that the learner trains"
        )
    return _of_digest(weights_digest(_manifest(buffers[0])))


def _of_digest(digest: bytes) -> ArithmeticWeights:
    return ArithmeticWeights(int.from_bytes(digest[:8], "little"))


def _manifest(data: bytes | memoryview) -> WeightManifest:
    return WeightManifest((tensor_entry(_TENSOR_NAME, "int64", (_WEIGHT_ELEMENTS,), data),))


class ArithmeticTokenizer:
    """One token per letter, digit or space; anything else counts as a space."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; none for the empty text."""
        return [1 + max(_ALPHABET.find(character), 0) for character in text]

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of token ids; the end of a sequence has none."""
        return "".join(_ALPHABET[token_id - 1] for token_id in token_ids if token_id != END_OF_SEQUENCE)


def _hash(a: int, b: int, c: int) -> int:
    """64 bits that depend on all three numbers."""
    state = (a * GAMMA + b * 0xC2B2AE3D27D4EB4F + c * 0x165667B19E3779F9) & MASK_64
    return mix64(mix64(state + 0x2545F4914F6CDD1D & MASK_64))
