"""Policy versions, sampling parameters, model signatures."""

from __future__ import annotations

import hashlib
import math
from typing import Final

from leeway.errors import InvalidDataError
from leeway.types import ModelSignature, PolicyVersion, SamplingParams
from leeway.v1 import common_pb2

DIGEST_BYTES: Final = hashlib.sha256().digest_size


def version_to_proto(version: PolicyVersion) -> common_pb2.PolicyVersion:
    return common_pb2.PolicyVersion(run=version.run, epoch=version.epoch, step=version.step, digest=version.digest)


def version_from_proto(message: common_pb2.PolicyVersion) -> PolicyVersion:
    version = PolicyVersion(message.run, message.epoch, message.step, message.digest)
    check_version(version)
    return version


def check_version(version: PolicyVersion) -> None:
    """Raises InvalidDataError for one that names nothing."""
    if not version.run or len(version.digest) != DIGEST_BYTES:
        raise InvalidDataError("a policy version needs a run and a 32-byte digest")


def sampling_to_proto(params: SamplingParams) -> common_pb2.SamplingParams:
    return common_pb2.SamplingParams(
        temperature=params.temperature,
        max_tokens=params.max_tokens,
        stop_token_ids=params.stop_token_ids,
        seed=params.seed,
        topk=params.topk,
        routing=params.routing,
    )


def sampling_from_proto(message: common_pb2.SamplingParams) -> SamplingParams:
    if not (math.isfinite(message.temperature) and message.temperature > 0):
        raise InvalidDataError(f"temperature must be a finite number above 0, but is {message.temperature}")
    if message.max_tokens < 1:
        raise InvalidDataError("max_tokens must be at least 1")
    return SamplingParams(
        temperature=message.temperature,
        max_tokens=message.max_tokens,
        stop_token_ids=tuple(message.stop_token_ids),
        seed=message.seed,
        topk=message.topk,
        routing=message.routing,
    )


def signature_to_proto(signature: ModelSignature) -> common_pb2.ModelSignature:
    return common_pb2.ModelSignature(
        model_digest=signature.model_digest,
        tokenizer_digest=signature.tokenizer_digest,
        vocab_size=signature.vocab_size,
        moe_layers=signature.moe_layers,
        experts=signature.experts,
        experts_per_token=signature.experts_per_token,
        context_length=signature.context_length,
    )


def signature_from_proto(message: common_pb2.ModelSignature) -> ModelSignature:
    return ModelSignature(
        model_digest=message.model_digest,
        tokenizer_digest=message.tokenizer_digest,
        vocab_size=message.vocab_size,
        moe_layers=message.moe_layers,
        experts=message.experts,
        experts_per_token=message.experts_per_token,
        context_length=message.context_length,
    )
