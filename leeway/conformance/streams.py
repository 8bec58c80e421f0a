"""INFO, STREAM, RECORD: the server's description of itself, the shape of what Generate sends, and recorded columns."""

from __future__ import annotations

import re

import numpy as np

from leeway.conformance.client import Completion
from leeway.conformance.requirement import NotSupportedError, Requirement, Violation, require
from leeway.conformance.session import Session
from leeway.errors import InvalidDataError
from leeway.types import ColumnKind, FinishReason, LogprobMode, SamplingParams

WHOLE = ("STREAM-1", "STREAM-2", "STREAM-3")
"""Requirements that must hold before a completion can be read at all."""

_MASS_ERROR = 1e-3


# INFO


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


# STREAM


async def plain_completion(session: Session) -> Completion:
    """A completion without top-K and routing, sampled once for all checks."""
    if "plain" not in session.shared:
        session.shared["plain"] = await session.generate(0, SamplingParams(max_tokens=session.at_most(40), seed=11))
    return session.shared["plain"]


def require_ended(completion: Completion, reason: FinishReason, cause: str) -> None:
    """It ended for this reason."""
    found = completion.finish_reason and completion.finish_reason.name
    require(completion.finish_reason is reason, f"{cause} ended a completion as {found}, not {reason.name}")


def _require_contiguous(completion: Completion, kind: ColumnKind, first: int) -> int:
    """Ranges of one kind follow each other from `first` on; returns the end of the last."""
    at = first
    for column in completion.columns(kind):
        where = f"{kind.name} [{column.start_token}, {column.end_token})"
        require(column.start_token == at, f"{where} came where token {at} comes next")
        at = column.end_token
    require(at > first, f"no {kind.name} column came")
    return at


def _require_type(completion: Completion, kind: ColumnKind, dtype: str, *row: int) -> None:
    """Columns of one kind have an element type and a shape [n, *row]."""
    for column in completion.columns(kind):
        found, wanted = column.values.dtype.name, ["n", *row]
        fits = found == dtype and column.values.ndim == len(wanted) and column.values.shape[1:] == row
        require(fits, f"{kind.name} is {found} {list(column.values.shape)}, not {dtype} {wanted}".replace("'", ""))


async def _ends_once(session: Session) -> str:
    completion = await plain_completion(session)
    require(completion.finish_reason is not None, "the stream ended without `finished`")
    require(not completion.after_finished, f"{completion.after_finished} messages came after `finished`")
    return f"{len(completion.chunks)} chunks, then `finished`"


async def _follow_each_other(session: Session) -> str:
    completion = await plain_completion(session)
    first = len(completion.prompt)
    _require_contiguous(completion, ColumnKind.BEHAVIOR_LOGPROBS, first)
    return f"both columns cover [{first}, {_require_contiguous(completion, ColumnKind.TOKEN_IDS, first)})"


async def _agree(session: Session) -> str:
    completion = await plain_completion(session)
    require(not completion.malformed, f"a chunk is malformed: {(completion.malformed or [''])[0]}")
    _require_type(completion, ColumnKind.TOKEN_IDS, "int32")
    _require_type(completion, ColumnKind.BEHAVIOR_LOGPROBS, "float32")
    tokens, logprobs, announced = len(completion.token_ids), len(completion.logprobs), completion.announced_tokens
    require(tokens == logprobs, f"{tokens} token ids came with {logprobs} log-probs")
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
    number = sum(len(chunk.segments) for chunk in (await plain_completion(session)).chunks)
    require(not number, f"{number} segments came; they are the rollout worker's to write")
    return "no segments"


async def _length(session: Session) -> str:
    for tokens in (1, 3, session.at_most(17)):
        completion = await session.generate(1, SamplingParams(max_tokens=tokens, seed=3))
        require(len(completion.token_ids) == tokens, f"max_tokens {tokens} gave {len(completion.token_ids)} tokens")
        require_ended(completion, FinishReason.LENGTH, f"max_tokens {tokens}")
    return "max_tokens tokens, then LENGTH"


async def _stop_token(session: Session) -> str:
    tokens = session.at_most(24)
    ids = (await session.generate(2, SamplingParams(max_tokens=tokens, seed=5))).token_ids
    stop = int(ids[len(ids) // 2])
    completion = await session.generate(2, SamplingParams(max_tokens=tokens, seed=5, stop_token_ids=(stop,)))
    sampled = completion.token_ids
    require(stop not in sampled[:-1], f"stop token {stop} was sampled, and sampling went on")
    require(len(sampled) > 0 and sampled[-1] == stop, f"stop token {stop} is not the last token of the completion")
    require_ended(completion, FinishReason.STOP, "a stop token")
    require(len(completion.logprobs) == len(sampled), "the stop token came without its log-prob")
    return f"ended after {len(sampled)} tokens with the stop token and its log-prob"


async def _only_what_was_asked(session: Session) -> str:
    completion = await plain_completion(session)
    more = {kind.name for kind in ColumnKind if kind > ColumnKind.BEHAVIOR_LOGPROBS and completion.columns(kind)}
    require(not more, f"{', '.join(sorted(more))} came without being asked for")
    return "token ids and log-probs alone"


# RECORD


async def _topk_completion(session: Session) -> Completion:
    """A completion with as many candidates as the server records, sampled once for all checks."""
    largest = session.info.max_topk
    if not largest:
        raise NotSupportedError("max_topk is 0")
    if "topk" not in session.shared:
        sampling = SamplingParams(max_tokens=session.at_most(40), temperature=0.7, seed=13, topk=largest)
        session.shared["topk"] = await session.generate(3, sampling)
    return session.shared["topk"]


async def _topk_shape(session: Session) -> str:
    completion = await _topk_completion(session)
    count, largest = len(completion.token_ids), session.info.max_topk
    for kind, dtype in ((ColumnKind.TOPK_TOKEN_IDS, "int32"), (ColumnKind.TOPK_LOGPROBS, "float32")):
        covered = _require_contiguous(completion, kind, len(completion.prompt)) - len(completion.prompt)
        require(covered == count, f"{kind.name} covers {covered} of {count} sampled tokens")
        _require_type(completion, kind, dtype, largest)
    return f"[{count}, {largest}]"


async def _topk_values(session: Session) -> str:
    completion = await _topk_completion(session)
    ids, logprobs = completion.values(ColumnKind.TOPK_TOKEN_IDS), completion.values(ColumnKind.TOPK_LOGPROBS)
    vocab_size = session.info.signature.vocab_size
    require(((ids >= 0) & (ids < vocab_size)).all(), f"a candidate is outside the vocabulary of {vocab_size}")
    require(all(len(set(row)) == len(row) for row in ids.tolist()), "a candidate is listed twice for one token")
    require((np.diff(logprobs, axis=1) <= 1e-6).all(), "candidates do not come likeliest first")
    mass = float(np.exp(logprobs.astype(np.float64)).sum(axis=1).max())
    require(mass <= 1.0 + _MASS_ERROR, f"the probabilities of one token's candidates sum to {mass:.4f}")
    same = ids == completion.token_ids[:, None]
    rows = same.any(axis=1)
    claimed, listed = completion.logprobs[rows], logprobs[same]
    error = float(np.abs(claimed - listed).max()) if rows.any() else 0.0
    require(
        error <= session.options.tolerance,
        f"a sampled token's log-prob differs from its candidate's by {error:.3f}: both must be of one distribution",
    )
    return f"sorted, mass at most {mass:.4f}, {int(rows.sum())} sampled tokens among the candidates"


async def _routing(session: Session) -> str:
    if not session.info.routing:
        raise NotSupportedError("routing is not offered")
    signature = session.info.signature
    sampling = SamplingParams(max_tokens=session.at_most(24), seed=17, routing=True)
    completion = await session.generate(4, sampling)
    end = _require_contiguous(completion, ColumnKind.ROUTING, 0)
    expected = len(completion.prompt) + len(completion.token_ids) - 1
    require(end == expected, f"routing has {end} rows; prompt and completion have {expected} without the last token")
    dtype = "uint8" if signature.experts <= 256 else "uint16"
    shape = (signature.moe_layers, signature.experts_per_token)
    _require_type(completion, ColumnKind.ROUTING, dtype, *shape)
    rows = completion.values(ColumnKind.ROUTING)
    require(int(rows.max()) < signature.experts, f"expert {int(rows.max())} was chosen of {signature.experts}")
    ordered = np.sort(rows, axis=2)
    require((ordered[:, :, 1:] != ordered[:, :, :-1]).all(), "an expert was chosen twice for one token")
    return f"{end} rows of {dtype} [{shape[0]}, {shape[1]}]"


_SERVED = ("INFO-3",)

REQUIREMENTS = (
    Requirement("INFO-1", "GetServerInfo answers, whole and consistent", _well_formed),
    Requirement("INFO-2", "log-probs are of the distribution sampled from", _mode, ("INFO-1",)),
    Requirement("INFO-3", "the version in force is the one that is named", _version, ("INFO-1",)),
    Requirement("STREAM-1", "`finished` is the last message, once", _ends_once, _SERVED),
    Requirement("STREAM-2", "ranges of a column are contiguous from the prompt's end on", _follow_each_other, _SERVED),
    Requirement("STREAM-3", "columns agree in length, type and token_count", _agree, _SERVED),
    Requirement("STREAM-4", "ids are in the vocabulary, log-probs finite and at most 0", _values, WHOLE),
    Requirement("STREAM-5", "max_tokens ends a completion as LENGTH", _length, WHOLE),
    Requirement("STREAM-6", "a stop token ends it as STOP and is part of it", _stop_token, (*WHOLE, "SEED-1")),
    Requirement("STREAM-7", "chunks carry no segments", _no_segments, _SERVED),
    Requirement("STREAM-8", "nothing is recorded that was not asked for", _only_what_was_asked, _SERVED),
    Requirement("RECORD-1", "top-K columns cover every sampled token", _topk_shape, WHOLE),
    Requirement("RECORD-2", "candidates are sorted and agree with the log-probs", _topk_values, (*WHOLE, "RECORD-1")),
    Requirement("RECORD-3", "routing covers prompt and completion without the last token", _routing, WHOLE),
)
