"""UPDATE: weights are replaced whole or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import grpc

from leeway.conformance.client import Refused, Update
from leeway.conformance.completion import Completion
from leeway.conformance.requirement import Requirement
from leeway.conformance.session import Session
from leeway.conformance.streams import WHOLE
from leeway.conformance.versions import labels
from leeway.conformance.violation import Violation, require
from leeway.conformance.weights import flipped, foreign_piece, pieces, renamed
from leeway.types import SamplingParams

Code = grpc.StatusCode
_DIGEST_REFUSALS = (Code.DATA_LOSS,)
_STATE_REFUSALS = (Code.FAILED_PRECONDITION,)
_TRANSFER_REFUSALS = (Code.INVALID_ARGUMENT, Code.DATA_LOSS, Code.FAILED_PRECONDITION, Code.CANCELLED)
_ODD_SIZES = (1, 7, 64, 1000, 4096)


async def _in_force(session: Session) -> str:
    first = await session.fingerprint()
    require(
        session.same_fingerprint(first, await session.fingerprint()), "equal requests differ before any update is sent"
    )
    version = await session.push(session.other_weights)
    info = await session.client.info()
    require(info.version == version, f"UpdateWeights answered {version}, but GetServerInfo says {info.version}")
    other = await session.fingerprint()
    require(
        not session.same_fingerprint(first, other), "other weights were acknowledged, but the same is sampled as before"
    )
    back = await session.push(session.weights)
    require(
        session.same_fingerprint(first, await session.fingerprint()),
        "after an update there and back the first weights' tokens or log-probs are not those of before",
    )
    return f"{version} and back to {back}"


async def _repeated(session: Session) -> str:
    before = await session.fingerprint()
    update = session.new_update(session.weights)
    session.served = await session.client.update(update)
    again = await session.client.update(replace(update, pieces=pieces(session.weights.buffers)))
    require(again == update.version, f"the repeated update to {update.version} answered {again}")
    info = await session.client.info()
    require(info.version == update.version, f"after a repeated update GetServerInfo says {info.version}")
    require(session.same_fingerprint(before, await session.fingerprint()), "a repeated update changed what is sampled")
    return str(again)


async def _any_cut(session: Session) -> str:
    version = await session.push(session.other_weights, _ODD_SIZES)
    other = await session.fingerprint()
    await session.push(session.other_weights)
    same = session.same_fingerprint(other, await session.fingerprint())
    await session.push(session.weights)
    require(
        same, f"{version}, sent in pieces of {_ODD_SIZES} bytes and more, samples otherwise than sent in large ones"
    )
    return f"pieces of {', '.join(map(str, _ODD_SIZES))} bytes, then the rest"


async def _require_refused(
    session: Session, what: str, update: Update, codes: Sequence[Code], before: Sequence[Completion]
) -> str:
    """An update is refused with one of the codes, and the old version goes on, as it was."""
    try:
        version = await session.client.update(update)
    except Refused as refusal:
        names = " or ".join(code.name for code in codes)
        require(refusal.code in codes, f"{what} should be refused as {names}; {refusal}")
        require(refusal.message.strip(), f"{what} is refused as {refusal.code.name} without a message")
        code = refusal.code
    else:
        raise Violation(f"{what} is answered with {version} in force")
    info = await session.client.info()
    require(info.version == session.served, f"after {what} GetServerInfo says {info.version}, not {session.served}")
    after = await session.fingerprint()
    for completion in after:
        found = labels(completion)
        require(found == [session.served], f"after {what} tokens are labelled {', '.join(map(str, found))}")
    require(session.same_fingerprint(before, after), f"after {what} was refused, something else is sampled: a mixture")
    return f"{what}: {code.name}"


async def _corrupt(session: Session) -> str:
    before = await session.fingerprint()
    other = session.other_weights
    update = replace(session.new_update(other), pieces=pieces(flipped(other.buffers)))
    prompt, sampling = session.prompt(9), SamplingParams(max_tokens=session.long_tokens, seed=31)
    reference = await session.generate(prompt, sampling)
    async with session.open(prompt, sampling) as stream:
        await stream.read()
        finding = await _require_refused(session, "a flipped bit", update, _DIGEST_REFUSALS, before)
        completion = await stream.rest()
    require(completion.equals(reference, session.options.tolerance), "a refused update changed a sequence in flight")
    require(labels(completion) == [session.served], "a refused update changed the labels of a sequence in flight")
    return finding


async def _wrong_digest(session: Session) -> str:
    before = await session.fingerprint()
    update = session.new_update(session.other_weights)
    announced = replace(update.version, digest=hashlib.sha256(b"something else").digest())
    what = "a version whose digest is not its manifest's"
    return await _require_refused(session, what, replace(update, version=announced), _DIGEST_REFUSALS, before)


async def _wrong_length(session: Session) -> str:
    before = await session.fingerprint()
    data = session.other_weights.buffers
    short, long = [*data[:-1], data[-1][:-1]], [*data, b"more"]
    findings = [
        await _require_refused(
            session,
            what,
            replace(session.new_update(session.other_weights), pieces=pieces(sent)),
            _TRANSFER_REFUSALS,
            before,
        )
        for what, sent in (("a byte too few", short), ("bytes too many", long), ("no bytes", []))
    ]
    given_up = replace(session.new_update(session.other_weights), pieces=pieces(short), cancel_at_end=True)
    findings.append(await _require_refused(session, "an update given up", given_up, (Code.CANCELLED,), before))
    return "; ".join(findings)


async def _foreign_manifest(session: Session) -> str:
    before = await session.fingerprint()
    update = session.new_update(renamed(session.other_weights))
    return await _require_refused(session, "the weights of another model", update, _STATE_REFUSALS, before)


async def _large_message(session: Session) -> str:
    """Where messages are limited to gRPC's 4 MiB, one with 4 MiB of data is refused for its size, whatever it holds."""
    before = await session.fingerprint()
    update = session.new_update(foreign_piece())
    what = "a message with 4 MiB of another model's weights"
    return await _require_refused(session, what, update, _STATE_REFUSALS, before)


async def _older_epoch(session: Session) -> str:
    await session.push(session.weights)
    before = await session.fingerprint()
    update = session.new_update(session.other_weights)
    session.publisher_epoch -= 1  # it was not used
    older = session.publisher_epoch - 1
    update = replace(update, publisher_epoch=older, version=replace(update.version, epoch=older))
    what = f"epoch {older} after epoch {session.publisher_epoch}"
    return await _require_refused(session, what, update, _STATE_REFUSALS, before)


_NEEDS = (*WHOLE, "SEED-1", "UPDATE-1")
_REFUSAL_NEEDS = (*_NEEDS, "VERSION-1", "VERSION-2")

REQUIREMENTS = (
    Requirement("UPDATE-1", "an acknowledged update is in force, and only then", _in_force, needs=(*WHOLE, "SEED-1")),
    Requirement("UPDATE-2", "the version already served may be sent again", _repeated, needs=_NEEDS),
    Requirement("UPDATE-3", "corrupted bytes are DATA_LOSS; the old weights stay", _corrupt, needs=_REFUSAL_NEEDS),
    Requirement("UPDATE-4", "another digest than the manifest's is DATA_LOSS", _wrong_digest, needs=_REFUSAL_NEEDS),
    Requirement("UPDATE-5", "too few or too many bytes are refused", _wrong_length, needs=_REFUSAL_NEEDS),
    Requirement("UPDATE-6", "another model's manifest is FAILED_PRECONDITION", _foreign_manifest, needs=_REFUSAL_NEEDS),
    Requirement("UPDATE-7", "an older learner is FAILED_PRECONDITION", _older_epoch, needs=_REFUSAL_NEEDS),
    Requirement("UPDATE-8", "bytes may be cut anywhere", _any_cut, needs=_NEEDS),
    Requirement("UPDATE-9", "a message may hold 4 MiB of them", _large_message, needs=(*_REFUSAL_NEEDS, "UPDATE-6")),
)
