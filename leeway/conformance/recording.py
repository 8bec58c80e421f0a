"""RECORD: top-K candidates and routing, for servers that offer them."""

from __future__ import annotations

import numpy as np

from leeway.conformance.completion import Completion
from leeway.conformance.requirement import Requirement
from leeway.conformance.session import Session
from leeway.conformance.streams import WHOLE, require_contiguous
from leeway.conformance.violation import NotSupportedError, require
from leeway.types import ColumnKind, SamplingParams

_MASS_ERROR = 1e-3


async def topk_completion(session: Session) -> Completion:
    """A completion with as many candidates as the server records, sampled once for all checks."""
    largest = session.info.max_topk
    if not largest:
        raise NotSupportedError("max_topk is 0")
    if "topk" not in session.shared:
        sampling = SamplingParams(max_tokens=min(40, session.long_tokens), temperature=0.7, seed=13, topk=largest)
        session.shared["topk"] = await session.generate(session.prompt(3), sampling)
    return session.shared["topk"]


async def _topk_shape(session: Session) -> str:
    completion = await topk_completion(session)
    count, largest = len(completion.token_ids), session.info.max_topk
    for kind, dtype in ((ColumnKind.TOPK_TOKEN_IDS, "int32"), (ColumnKind.TOPK_LOGPROBS, "float32")):
        end = require_contiguous(completion, kind, len(completion.prompt))
        covered = end - len(completion.prompt)
        require(covered == count, f"{kind.name} covers {covered} of {count} sampled tokens")
        for column in completion.columns(kind):
            found = f"{column.values.dtype.name} {list(column.values.shape)}"
            fits = column.values.dtype.name == dtype and column.values.shape[1:] == (largest,)
            require(fits, f"{kind.name} is {found}, not {dtype} [n, {largest}]")
    return f"[{count}, {largest}]"


async def _topk_values(session: Session) -> str:
    completion = await topk_completion(session)
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
    info = session.info
    if not info.routing:
        raise NotSupportedError("routing is not offered")
    sampling = SamplingParams(max_tokens=min(24, session.long_tokens), seed=17, routing=True)
    completion = await session.generate(session.prompt(4), sampling)
    signature = info.signature
    end = require_contiguous(completion, ColumnKind.ROUTING, 0)
    expected = len(completion.prompt) + len(completion.token_ids) - 1
    require(end == expected, f"routing has {end} rows; prompt and completion have {expected} without the last token")
    dtype = "uint8" if signature.experts <= 256 else "uint16"
    shape = (signature.moe_layers, signature.experts_per_token)
    for column in completion.columns(ColumnKind.ROUTING):
        found = f"{column.values.dtype.name} {list(column.values.shape)}"
        fits = column.values.dtype.name == dtype and column.values.shape[1:] == shape
        require(fits, f"routing is {found}, not {dtype} [n, {shape[0]}, {shape[1]}]")
    rows = completion.values(ColumnKind.ROUTING)
    require(int(rows.max()) < signature.experts, f"expert {int(rows.max())} was chosen of {signature.experts}")
    ordered = np.sort(rows, axis=2)
    require((ordered[:, :, 1:] != ordered[:, :, :-1]).all(), "an expert was chosen twice for one token")
    return f"{end} rows of {dtype} [{shape[0]}, {shape[1]}]"


REQUIREMENTS = (
    Requirement("RECORD-1", "top-K columns cover every sampled token", _topk_shape, needs=WHOLE),
    Requirement("RECORD-2", "candidates are sorted and agree with the log-probs", _topk_values, (*WHOLE, "RECORD-1")),
    Requirement("RECORD-3", "routing covers prompt and completion without the last token", _routing, needs=WHOLE),
)
