"""VERSION: every sampled token carries the version that really sampled it, also across an update in mid-sequence."""

from __future__ import annotations

from dataclasses import dataclass

from leeway.conformance.completion import Completion
from leeway.conformance.requirement import Requirement
from leeway.conformance.session import Session
from leeway.conformance.streams import WHOLE, plain_completion
from leeway.conformance.violation import Violation, require
from leeway.types import Int32Array, PolicyVersion, SamplingParams

_SURE = 1e-3
"""A token whose log-prob is nearer to 0 says nothing about the weights that sampled it."""


def require_covered(completion: Completion) -> None:
    """Version spans cover the sampled tokens, each once, in order."""
    at = len(completion.prompt)
    end = at + len(completion.token_ids)
    for span in completion.spans:
        where = f"version span [{span.start_token}, {span.end_token})"
        require(span.start_token == at, f"{where} came where token {at} comes next")
        at = span.end_token
    require(at == end, f"version spans end at token {at}, the completion at {end}")


def labels(completion: Completion) -> list[PolicyVersion]:
    """The versions that are named, each once, in order."""
    versions: list[PolicyVersion] = []
    for span in completion.spans:
        if not versions or versions[-1] != span.version:
            versions.append(span.version)
    return versions


async def _cover(session: Session) -> str:
    completion = await plain_completion(session)
    require_covered(completion)
    return f"{len(completion.spans)} spans over {len(completion.token_ids)} tokens"


async def _name_what_is_served(session: Session) -> str:
    completion = await session.generate(session.prompt(5), SamplingParams(max_tokens=min(16, session.long_tokens)))
    require_covered(completion)
    found = labels(completion)
    require(found == [session.served], f"{session.served} is served, but tokens are labelled {_listed(found)}")
    return str(session.served)


@dataclass(frozen=True, slots=True)
class Swapped:
    """A completion during which an update came into force."""

    completion: Completion
    reference: Completion  # of the same request, all of it before the update
    before: PolicyVersion
    after: PolicyVersion
    paused: bool  # whether decoding was paused for the update


async def swapped_completion(session: Session) -> Swapped:
    """An update in mid-sequence. Longer sequences are tried, and at last a pause, until it falls into one."""
    lengths = session.longer_and_longer()
    attempts = [(length, False) for length in lengths] + [(length, True) for length in lengths[-1:] * 4]
    for length, paused in attempts:
        prompt = session.prompt(6)
        sampling = SamplingParams(max_tokens=length, seed=23)
        reference = await session.generate(prompt, sampling)
        before = session.served
        assert before is not None
        async with session.open(prompt, sampling) as stream:
            while not stream.completion.chunks and await stream.read():
                pass
            if paused:
                async with session.paused():
                    after = await session.push(session.other_weights)
            else:
                after = await session.push(session.other_weights)
            completion = await stream.rest()
        await session.push(session.weights)
        if after in labels(completion):
            return Swapped(completion, reference, before, after, paused)
    raise Violation(
        f"no update came into force within a sequence of {attempts[-1][0]} tokens, in {len(attempts)} attempts: "
        "sequences in flight must go on under the new version"
    )


async def _across_an_update(session: Session) -> str:
    swapped = await swapped_completion(session)
    completion, reference = swapped.completion, swapped.reference
    require_covered(completion)
    length = completion.sampling.max_tokens
    require(
        len(completion.token_ids) == length, f"{len(completion.token_ids)} of {length} tokens came after the update"
    )
    found = labels(completion)
    expected = [swapped.before, swapped.after]
    require(found == expected, f"an update from {_listed(expected)} labelled tokens {_listed(found)}")
    first_new = next(span.start_token for span in completion.spans if span.version == swapped.after)
    _require_true_labels(session, completion, reference, first_new - len(completion.prompt))
    how = "during a pause" if swapped.paused else "without a pause"
    return f"label changed at token {first_new} of {len(completion.prompt) + length}, {how}"


def _require_true_labels(session: Session, completion: Completion, reference: Completion, at: int) -> None:
    """Tokens before `at` are those that the old weights alone give; the one at `at` is not."""
    tolerance = session.options.tolerance
    ids, logprobs = completion.token_ids, completion.logprobs
    ref_ids, ref_logprobs = reference.token_ids, reference.logprobs
    for token in range(at):
        same = ids[token] == ref_ids[token] and abs(logprobs[token] - ref_logprobs[token]) <= tolerance
        require(
            bool(same),
            f"token {len(completion.prompt) + token} is labelled with the old version, whose weights do not give it",
        )
    sure = logprobs[at] > -_SURE
    same = ids[at] == ref_ids[at] and logprobs[at] == ref_logprobs[at]
    require(
        sure or not same,
        f"token {len(completion.prompt) + at} is labelled with the new version, but the old weights give it to the bit",
    )


async def _after_the_reply(session: Session) -> str:
    for weights in (session.other_weights, session.weights):
        version = await session.push(weights)
        requests: list[tuple[Int32Array, SamplingParams]] = [
            (session.prompt(number), SamplingParams(max_tokens=min(8, session.long_tokens), seed=number))
            for number in range(8)
        ]
        for completion in await session.generate_all(requests):
            found = labels(completion)
            require(found == [version], f"after the reply to {version} tokens are labelled {_listed(found)}")
    return "2 updates, 8 requests after each"


def _listed(versions: list[PolicyVersion]) -> str:
    return ", then ".join(str(version) for version in versions) or "not at all"


REQUIREMENTS = (
    Requirement("VERSION-1", "version spans cover every sampled token, in order", _cover, needs=WHOLE),
    Requirement("VERSION-2", "they name the version that is served", _name_what_is_served, (*WHOLE, "VERSION-1")),
    Requirement(
        "VERSION-3",
        "an update in mid-sequence changes the label where it changes the weights",
        _across_an_update,
        needs=(*WHOLE, "VERSION-1", "VERSION-2", "SEED-1", "UPDATE-1"),
    ),
    Requirement(
        "VERSION-4",
        "after the reply no token is of the older version",
        _after_the_reply,
        needs=(*WHOLE, "VERSION-1", "VERSION-2", "UPDATE-1"),
    ),
)
