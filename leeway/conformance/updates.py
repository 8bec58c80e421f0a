"""VERSION, UPDATE: tokens carry the version that sampled them, and weights are replaced whole or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import grpc

from leeway.conformance.client import Completion, Refused, Update
from leeway.conformance.requirement import Requirement, Violation, require
from leeway.conformance.session import Session
from leeway.conformance.streams import WHOLE, plain_completion
from leeway.conformance.weights import flipped, foreign_piece, pieces, renamed
from leeway.types import PolicyVersion, SamplingParams

_SURE = 1e-3
"""A token whose log-prob is nearer to 0 says nothing about the weights that sampled it."""
_ODD_SIZES = (1, 7, 64, 1000, 4096)

Code = grpc.StatusCode
_DIGEST_REFUSALS = (Code.DATA_LOSS,)
_STATE_REFUSALS = (Code.FAILED_PRECONDITION,)
_TRANSFER_REFUSALS = (Code.INVALID_ARGUMENT, Code.DATA_LOSS, Code.FAILED_PRECONDITION, Code.CANCELLED)


# VERSION


def require_covered(completion: Completion) -> None:
    """Version spans cover the sampled tokens, each once, in order."""
    at = len(completion.prompt)
    end = at + len(completion.token_ids)
    for span in completion.spans:
        where = f"version span [{span.start_token}, {span.end_token})"
        require(span.start_token == at, f"{where} came where token {at} comes next")
        at = span.end_token
    require(at == end, f"version spans end at token {at}, the completion at {end}")


def _require_labels(completion: Completion, expected: Sequence[PolicyVersion | None], circumstance: str) -> None:
    """The versions that spans name, each once, in order, are the expected ones."""
    found: list[PolicyVersion] = []
    for span in completion.spans:
        if not found or found[-1] != span.version:
            found.append(span.version)
    require(found == list(expected), f"{circumstance} tokens are labelled {_listed(found)}")


def _listed(versions: Sequence[PolicyVersion]) -> str:
    return ", then ".join(map(str, versions)) or "not at all"


async def _cover(session: Session) -> str:
    completion = await plain_completion(session)
    require_covered(completion)
    return f"{len(completion.spans)} spans over {len(completion.token_ids)} tokens"


async def _name_what_is_served(session: Session) -> str:
    completion = await session.generate(5, SamplingParams(max_tokens=session.at_most(16)))
    require_covered(completion)
    _require_labels(completion, [session.served], f"{session.served} is served, but")
    return str(session.served)


@dataclass(frozen=True, slots=True)
class _Swapped:
    """A completion during which an update came into force."""

    completion: Completion
    reference: Completion  # of the same request, all of it before the update
    before: PolicyVersion
    after: PolicyVersion
    paused: bool  # whether decoding was paused for the update


async def _swapped_completion(session: Session) -> _Swapped:
    """An update in mid-sequence. Longer sequences are tried, and at last a pause, until it falls into one."""
    lengths = session.longer_and_longer()
    attempts = [(length, False) for length in lengths] + [(length, True) for length in lengths[-1:] * 4]
    for length, paused in attempts:
        sampling = SamplingParams(max_tokens=length, seed=23)
        reference = await session.generate(6, sampling)
        before = session.served
        assert before is not None
        async with session.open(6, sampling) as stream:
            while not stream.completion.chunks and await stream.read():
                pass
            if paused:
                async with session.paused():
                    after = await session.push(session.other_weights)
            else:
                after = await session.push(session.other_weights)
            completion = await stream.rest()
        await session.push(session.weights)
        if any(span.version == after for span in completion.spans):
            return _Swapped(completion, reference, before, after, paused)
    raise Violation(
        f"no update came into force within a sequence of {attempts[-1][0]} tokens, in {len(attempts)} attempts: "
        "sequences in flight must go on under the new version"
    )


async def _across_an_update(session: Session) -> str:
    swapped = await _swapped_completion(session)
    completion, reference = swapped.completion, swapped.reference
    require_covered(completion)
    length, prompt_length = completion.sampling.max_tokens, len(completion.prompt)
    require(
        len(completion.token_ids) == length, f"{len(completion.token_ids)} of {length} tokens came after the update"
    )
    expected = [swapped.before, swapped.after]
    _require_labels(completion, expected, f"in an update from {_listed(expected)}")
    first_new = next(span.start_token for span in completion.spans if span.version == swapped.after)
    # Tokens before the first new one are those that the old weights alone give; that one is not.
    old = first_new - prompt_length
    ids, logprobs = completion.token_ids, completion.logprobs
    for token in range(old):
        difference = abs(logprobs[token] - reference.logprobs[token])
        require(
            ids[token] == reference.token_ids[token] and difference <= session.options.tolerance,
            f"token {prompt_length + token} is labelled with the old version, whose weights do not give it",
        )
    same = ids[old] == reference.token_ids[old] and logprobs[old] == reference.logprobs[old]
    require(
        logprobs[old] > -_SURE or not same,
        f"token {first_new} is labelled with the new version, but the old weights give it to the bit",
    )
    how = "during a pause" if swapped.paused else "without a pause"
    return f"label changed at token {first_new} of {prompt_length + length}, {how}"


async def _after_the_reply(session: Session) -> str:
    for weights in (session.other_weights, session.weights):
        version = await session.push(weights)
        tokens = session.at_most(8)
        requests = [(session.prompt(seed), SamplingParams(max_tokens=tokens, seed=seed)) for seed in range(8)]
        for completion in await session.generate_all(requests):
            _require_labels(completion, [version], f"after the reply to {version}")
    return "2 updates, 8 requests after each"


# UPDATE


async def _in_force(session: Session) -> str:
    first = await session.fingerprint()

    async def as_first() -> bool:
        return session.same_fingerprint(first, await session.fingerprint())

    require(await as_first(), "equal requests differ before any update is sent")
    version = await session.push(session.other_weights)
    info = await session.client.info()
    require(info.version == version, f"UpdateWeights answered {version}, but GetServerInfo says {info.version}")
    require(not await as_first(), "other weights were acknowledged, but the same is sampled as before")
    back = await session.push(session.weights)
    require(await as_first(), "after an update there and back the first weights' tokens or log-probs have changed")
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
    require(same, f"{version}, sent in pieces of {_ODD_SIZES} bytes and more, samples otherwise than in large ones")
    return f"pieces of {', '.join(map(str, _ODD_SIZES))} bytes, then the rest"


async def _refused(
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
        _require_labels(completion, [session.served], f"after {what}")
    require(session.same_fingerprint(before, after), f"after {what} was refused, something else is sampled: a mixture")
    return f"{what}: {code.name}"


async def _corrupt(session: Session) -> str:
    before = await session.fingerprint()
    other = session.other_weights
    update = replace(session.new_update(other), pieces=pieces(flipped(other.buffers)))
    sampling = SamplingParams(max_tokens=session.long_tokens, seed=31)
    reference = await session.generate(9, sampling)
    async with session.open(9, sampling) as stream:
        await stream.read()
        finding = await _refused(session, "a flipped bit", update, _DIGEST_REFUSALS, before)
        completion = await stream.rest()
    require(completion.equals(reference, session.options.tolerance), "a refused update changed a sequence in flight")
    _require_labels(completion, [session.served], "after a refused update, in a sequence in flight,")
    return finding


async def _wrong_digest(session: Session) -> str:
    before = await session.fingerprint()
    update = session.new_update(session.other_weights)
    update = replace(update, version=replace(update.version, digest=hashlib.sha256(b"something else").digest()))
    what = "a version whose digest is not its manifest's"
    return await _refused(session, what, update, _DIGEST_REFUSALS, before)


async def _wrong_length(session: Session) -> str:
    before = await session.fingerprint()
    data = session.other_weights.buffers
    short, long = [*data[:-1], data[-1][:-1]], [*data, b"more"]
    findings: list[str] = []
    for what, sent in (("a byte too few", short), ("bytes too many", long), ("no bytes", [])):
        update = replace(session.new_update(session.other_weights), pieces=pieces(sent))
        findings.append(await _refused(session, what, update, _TRANSFER_REFUSALS, before))
    given_up = replace(session.new_update(session.other_weights), pieces=pieces(short), cancel_at_end=True)
    findings.append(await _refused(session, "an update given up", given_up, (Code.CANCELLED,), before))
    return "; ".join(findings)


async def _foreign_manifest(session: Session) -> str:
    before = await session.fingerprint()
    update = session.new_update(renamed(session.other_weights))
    return await _refused(session, "the weights of another model", update, _STATE_REFUSALS, before)


async def _large_message(session: Session) -> str:
    """Where messages are limited to gRPC's 4 MiB, one with 4 MiB of data is refused for its size, not its content."""
    before = await session.fingerprint()
    what = "a message with 4 MiB of another model's weights"
    return await _refused(session, what, session.new_update(foreign_piece()), _STATE_REFUSALS, before)


async def _older_epoch(session: Session) -> str:
    await session.push(session.weights)
    before = await session.fingerprint()
    update = session.new_update(session.other_weights)
    session.publisher_epoch -= 1  # it was not used
    older = session.publisher_epoch - 1
    update = replace(update, publisher_epoch=older, version=replace(update.version, epoch=older))
    return await _refused(session, f"epoch {older} after epoch {older + 1}", update, _STATE_REFUSALS, before)


_LABELS = (*WHOLE, "VERSION-1", "VERSION-2")
_UPDATES = (*WHOLE, "SEED-1", "UPDATE-1")
_REFUSALS = (*_UPDATES, "VERSION-1", "VERSION-2")

REQUIREMENTS = (
    Requirement("UPDATE-1", "an acknowledged update is in force, and only then", _in_force, (*WHOLE, "SEED-1")),
    Requirement("UPDATE-2", "the version already served may be sent again", _repeated, _UPDATES),
    Requirement("UPDATE-3", "corrupted bytes are DATA_LOSS; the old weights stay", _corrupt, _REFUSALS),
    Requirement("UPDATE-4", "another digest than the manifest's is DATA_LOSS", _wrong_digest, _REFUSALS),
    Requirement("UPDATE-5", "too few or too many bytes are refused", _wrong_length, _REFUSALS),
    Requirement("UPDATE-6", "another model's manifest is FAILED_PRECONDITION", _foreign_manifest, _REFUSALS),
    Requirement("UPDATE-7", "an older learner is FAILED_PRECONDITION", _older_epoch, _REFUSALS),
    Requirement("UPDATE-8", "bytes may be cut anywhere", _any_cut, _UPDATES),
    Requirement("UPDATE-9", "a message may hold 4 MiB of them", _large_message, (*_REFUSALS, "UPDATE-6")),
    Requirement("VERSION-1", "version spans cover every sampled token, in order", _cover, WHOLE),
    Requirement("VERSION-2", "they name the version that is served", _name_what_is_served, (*WHOLE, "VERSION-1")),
    Requirement(
        "VERSION-3",
        "an update in mid-sequence changes the label where it changes the weights",
        _across_an_update,
        (*_LABELS, "SEED-1", "UPDATE-1"),
    ),
    Requirement(
        "VERSION-4", "after the reply no token is of the older version", _after_the_reply, (*_LABELS, "UPDATE-1")
    ),
)
