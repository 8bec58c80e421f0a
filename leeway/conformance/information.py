"""INFO: what a server says of itself."""

from __future__ import annotations

import re

from leeway.conformance.requirement import Requirement
from leeway.conformance.session import Session
from leeway.conformance.violation import Violation, require
from leeway.errors import InvalidDataError
from leeway.types import LogprobMode


async def _well_formed(session: Session) -> str:
    try:
        info = await session.introduce()
    except InvalidDataError as error:
        raise Violation(f"GetServerInfo: {error.message}") from None
    signature = info.signature
    for name, digest in (("model", signature.model_digest), ("tokenizer", signature.tokenizer_digest)):
        require(len(digest) == 32, f"signature.{name}_digest has {len(digest)} bytes; a SHA-256 has 32")
    require(signature.vocab_size >= 2, f"signature.vocab_size is {signature.vocab_size}")
    require(signature.context_length >= 2, f"signature.context_length is {signature.context_length}")
    require(re.fullmatch(r"[^/\s]+/\S+", info.engine) is not None, f"engine is {info.engine!r}; say name/version")
    require(info.max_concurrency >= 1, "max_concurrency is 0; nothing could be decoded")
    require(info.max_topk <= signature.vocab_size, f"max_topk is {info.max_topk}, more than there are tokens")
    moe = (signature.moe_layers, signature.experts, signature.experts_per_token)
    require(all(moe) or not any(moe), f"moe_layers, experts, experts_per_token are {moe}: all or none must be 0")
    require(signature.experts_per_token <= max(signature.experts, 0), f"of {moe[1]} experts {moe[2]} are chosen")
    require(all(moe) or not info.routing, "routing is offered for a model without experts")
    return f"{info.engine}, vocabulary {signature.vocab_size}, context {signature.context_length}"


async def _mode(session: Session) -> str:
    mode = session.info.logprob_mode
    require(
        mode is LogprobMode.SAMPLED,
        f"logprob_mode is {mode.name}; a run accepts SAMPLED only: report what is sampled from, temperature included",
    )
    return "SAMPLED"


async def _version(session: Session) -> str:
    if session.base is None:
        served = session.info.version
        require(served is not None, "the server serves no version, and the kit has no weights to give it (--weights)")
        session.served = served
    else:
        await session.push(session.base)
    info = await session.client.info()
    require(info.version == session.served, f"{session.served} is in force, but GetServerInfo says {info.version}")
    return f"serves {session.served}"


REQUIREMENTS = (
    Requirement("INFO-1", "GetServerInfo answers, whole and consistent", _well_formed),
    Requirement("INFO-2", "log-probs are of the distribution sampled from", _mode, needs=("INFO-1",)),
    Requirement("INFO-3", "the version in force is the one that is named", _version, needs=("INFO-1",)),
)
