"""SEED: equal seeds give equal samples."""

from __future__ import annotations

import math

from leeway.conformance.requirement import Requirement
from leeway.conformance.session import Session
from leeway.conformance.statistics import FALSE_ALARM
from leeway.conformance.streams import WHOLE
from leeway.conformance.violation import NotSupportedError, require
from leeway.types import SamplingParams

_FIRST_LARGE_SEED = (1 << 63) + 1
_LARGE_SEEDS = 12


async def _equal(session: Session) -> str:
    tokens = min(32, session.long_tokens)
    for number, seed in enumerate((0, 1, 2**32 + 5, 2**64 - 1)):
        sampling = SamplingParams(max_tokens=tokens, seed=seed)
        once = await session.generate(session.prompt(number), sampling)
        again = await session.generate(session.prompt(number), sampling)
        require(once.equals(again, session.options.tolerance), f"seed {seed} gave other tokens when it was used again")
    return f"4 seeds, {tokens} tokens each, sampled twice"


async def _whole(session: Session) -> str:
    sampling = [
        SamplingParams(max_tokens=min(32, session.long_tokens), seed=_FIRST_LARGE_SEED + offset)
        for offset in range(_LARGE_SEEDS)
    ]
    completions = [await session.generate(session.prompt(), each) for each in sampling]
    # How likely it is that the others repeat the first one by chance.
    chance = math.exp(min(float(completions[0].logprobs.sum()), 0.0)) ** (_LARGE_SEEDS - 1)
    if chance > FALSE_ALARM:
        raise NotSupportedError(f"the model is so sure of itself that equal completions mean nothing ({chance:.2g})")
    distinct = {tuple(completion.token_ids.tolist()) for completion in completions}
    require(
        len(distinct) > 1,
        f"{_LARGE_SEEDS} seeds from {_FIRST_LARGE_SEED} on gave one and the same completion: all 64 bits must count",
    )
    return f"{_LARGE_SEEDS} neighbours above 2^63 gave {len(distinct)} completions"


REQUIREMENTS = (
    Requirement("SEED-1", "equal seeds give equal samples on equal weights", _equal, needs=WHOLE),
    Requirement("SEED-2", "all 64 bits of a seed count", _whole, needs=WHOLE),
)
