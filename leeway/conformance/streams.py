"""STREAM: the shape of what Generate sends."""

from __future__ import annotations

import numpy as np

from leeway.conformance.completion import Completion
from leeway.conformance.requirement import Requirement
from leeway.conformance.session import Session
from leeway.conformance.violation import Violation, require
from leeway.types import ColumnKind, FinishReason, SamplingParams

WHOLE = ("STREAM-1", "STREAM-2", "STREAM-3")
"""What must hold before a completion can be read at all."""
_TOKENS = 40


async def plain_completion(session: Session) -> Completion:
    """A completion without top-K and routing, sampled once for all checks."""
    if "plain" not in session.shared:
        tokens = min(_TOKENS, session.long_tokens)
        session.shared["plain"] = await session.generate(session.prompt(), SamplingParams(max_tokens=tokens, seed=11))
    return session.shared["plain"]


async def _ends_once(session: Session) -> str:
    completion = await plain_completion(session)
    require(completion.finish_reason is not None, "the stream ended without `finished`")
    require(not completion.after_finished, f"{completion.after_finished} messages came after `finished`")
    return f"{len(completion.chunks)} chunks, then `finished`"


async def _follow_each_other(session: Session) -> str:
    completion = await plain_completion(session)
    for kind in (ColumnKind.TOKEN_IDS, ColumnKind.BEHAVIOR_LOGPROBS):
        require_contiguous(completion, kind, len(completion.prompt))
    return f"both columns cover [{len(completion.prompt)}, {completion.columns(ColumnKind.TOKEN_IDS)[-1].end_token})"


def require_contiguous(completion: Completion, kind: ColumnKind, first: int) -> int:
    """Ranges of one kind follow each other from `first` on; returns the end of the last."""
    at = first
    for column in completion.columns(kind):
        where = f"{kind.name} [{column.start_token}, {column.end_token})"
        require(column.start_token == at, f"{where} came where token {at} comes next")
        at = column.end_token
    require(at > first, f"no {kind.name} column came")
    return at


async def _agree(session: Session) -> str:
    completion = await plain_completion(session)
    require(not completion.malformed, f"a chunk is malformed: {(completion.malformed or [''])[0]}")
    for kind, dtype in ((ColumnKind.TOKEN_IDS, "int32"), (ColumnKind.BEHAVIOR_LOGPROBS, "float32")):
        for column in completion.columns(kind):
            found = f"{column.values.dtype.name} {list(column.values.shape)}"
            require(
                column.values.ndim == 1 and column.values.dtype.name == dtype,
                f"{kind.name} is {found}, not {dtype} [n]",
            )
    tokens, logprobs = len(completion.token_ids), len(completion.logprobs)
    require(tokens == logprobs, f"{tokens} token ids came with {logprobs} log-probs")
    announced = completion.announced_tokens
    require(tokens == announced, f"{tokens} tokens came, but finished.token_count is {announced}")
    return f"{tokens} tokens, {logprobs} log-probs, token_count {announced}"


async def _values(session: Session) -> str:
    completion = await plain_completion(session)
    ids, logprobs = completion.token_ids, completion.logprobs
    vocab_size = session.info.signature.vocab_size
    require(((ids >= 0) & (ids < vocab_size)).all(), f"a token id is outside the vocabulary of {vocab_size}")
    require(np.isfinite(logprobs).all(), "a log-prob is not a finite number")
    require((logprobs <= 1e-4).all(), f"a log-prob is {float(logprobs.max())}; the largest possible one is 0")
    return f"log-probs from {float(logprobs.min()):.3f} to {float(logprobs.max()):.3f}"


async def _no_segments(session: Session) -> str:
    completion = await plain_completion(session)
    number = sum(len(chunk.segments) for chunk in completion.chunks)
    require(not number, f"{number} segments came; they are the rollout worker's to write")
    return "no segments"


async def _length(session: Session) -> str:
    prompt = session.prompt(1)
    for tokens in (1, 3, min(17, session.long_tokens)):
        completion = await session.generate(prompt, SamplingParams(max_tokens=tokens, seed=3))
        require(len(completion.token_ids) == tokens, f"max_tokens {tokens} gave {len(completion.token_ids)} tokens")
        reason = completion.finish_reason
        require(reason is FinishReason.LENGTH, f"max_tokens {tokens} ended as {reason and reason.name}, not LENGTH")
    return "max_tokens tokens, then LENGTH"


async def _stop_token(session: Session) -> str:
    sampling = SamplingParams(max_tokens=min(24, session.long_tokens), seed=5)
    ids = (await session.generate(session.prompt(2), sampling)).token_ids
    stop = int(ids[len(ids) // 2])
    stopping = SamplingParams(max_tokens=sampling.max_tokens, seed=5, stop_token_ids=(stop,))
    completion = await session.generate(session.prompt(2), stopping)
    reason, sampled = completion.finish_reason, completion.token_ids
    if stop in sampled[:-1]:
        raise Violation(f"stop token {stop} was sampled, and sampling went on")
    require(len(sampled) > 0 and sampled[-1] == stop, f"stop token {stop} is not the last token of the completion")
    require(reason is FinishReason.STOP, f"a stop token ended the completion as {reason and reason.name}, not STOP")
    require(len(completion.logprobs) == len(sampled), "the stop token came without its log-prob")
    return f"ended after {len(sampled)} tokens with the stop token and its log-prob"


async def _only_what_was_asked(session: Session) -> str:
    completion = await plain_completion(session)
    more = {kind.name for kind in ColumnKind if kind > ColumnKind.BEHAVIOR_LOGPROBS and completion.columns(kind)}
    require(not more, f"{', '.join(sorted(more))} came without being asked for")
    return "token ids and log-probs alone"


_SERVED = ("INFO-3",)

REQUIREMENTS = (
    Requirement("STREAM-1", "`finished` is the last message, once", _ends_once, needs=_SERVED),
    Requirement(
        "STREAM-2", "ranges of a column follow each other from the prompt's end on", _follow_each_other, _SERVED
    ),
    Requirement("STREAM-3", "columns agree in length, type and token_count", _agree, needs=_SERVED),
    Requirement("STREAM-4", "ids are in the vocabulary, log-probs finite and at most 0", _values, needs=WHOLE),
    Requirement("STREAM-5", "max_tokens ends a completion as LENGTH", _length, needs=WHOLE),
    Requirement("STREAM-6", "a stop token ends it as STOP and is part of it", _stop_token, needs=(*WHOLE, "SEED-1")),
    Requirement("STREAM-7", "chunks carry no segments", _no_segments, needs=_SERVED),
    Requirement("STREAM-8", "nothing is recorded that was not asked for", _only_what_was_asked, needs=_SERVED),
)
