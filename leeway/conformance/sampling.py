"""SEED, LOGPROB: equal seeds give equal samples, and log-probs are those of the distribution really sampled from."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
from numpy.typing import NDArray

from leeway.conformance.requirement import NotSupportedError, Requirement, Violation, require
from leeway.conformance.session import Session
from leeway.conformance.statistics import (
    FALSE_ALARM,
    Cells,
    FrequencyTest,
    claimed_cells,
    distance,
    miscalibration,
    tempered,
)
from leeway.conformance.streams import WHOLE
from leeway.types import ColumnKind, Int32Array, LogprobMode, SamplingParams

TEMPERATURE = 0.7
"""Away from 1, where the raw and the sampled distribution are the same."""
_FIRST_LARGE_SEED, _LARGE_SEEDS = (1 << 63) + 1, 12
_CANDIDATES, _CANDIDATE_SAMPLES = 4, 32
_POWER = 0.999
_MOST_SAMPLES = 8192
_MASS_ERROR = 0.005
_SEQUENCE_TOKENS = 3000


async def _equal(session: Session) -> str:
    tokens = session.at_most(32)
    for number, seed in enumerate((0, 1, 2**32 + 5, 2**64 - 1)):
        once, again = [await session.generate(number, SamplingParams(max_tokens=tokens, seed=seed)) for _ in range(2)]
        require(once.equals(again, session.options.tolerance), f"seed {seed} gave other tokens when it was used again")
    return f"4 seeds, {tokens} tokens each, sampled twice"


async def _whole(session: Session) -> str:
    seeds = range(_FIRST_LARGE_SEED, _FIRST_LARGE_SEED + _LARGE_SEEDS)
    completions = [
        await session.generate(0, SamplingParams(max_tokens=session.at_most(32), seed=seed)) for seed in seeds
    ]
    # The probability that the others repeat the first one by chance.
    chance = math.exp(min(float(completions[0].logprobs.sum()), 0.0)) ** (_LARGE_SEEDS - 1)
    if chance > FALSE_ALARM:
        raise NotSupportedError(f"the model is so sure of itself that equal completions mean nothing ({chance:.2g})")
    distinct = {tuple(completion.token_ids.tolist()) for completion in completions}
    require(
        len(distinct) > 1,
        f"{_LARGE_SEEDS} seeds from {_FIRST_LARGE_SEED} on gave one and the same completion: all 64 bits must count",
    )
    return f"{_LARGE_SEEDS} neighbours above 2^63 gave {len(distinct)} completions"


def _require_sampled_mode(session: Session) -> None:
    if session.info.logprob_mode is not LogprobMode.SAMPLED:
        raise NotSupportedError(f"logprob_mode is {session.info.logprob_mode.name}")


async def _first_tokens(
    session: Session, prompt: Int32Array, temperature: float, count: int
) -> tuple[Int32Array, NDArray[np.float32]]:
    """First tokens after one prompt, and the log-probs claimed for them; both [count]."""
    completions = await session.generate_all(
        (prompt, SamplingParams(max_tokens=1, temperature=temperature, seed=seed)) for seed in session.seeds(count)
    )
    require(all(len(completion.logprobs) == 1 for completion in completions), "max_tokens 1 did not give one log-prob")
    ids, logprobs = zip(*((completion.token_ids, completion.logprobs) for completion in completions), strict=True)
    return np.concatenate(ids), np.concatenate(logprobs)


async def _cells(session: Session, prompt: Int32Array, temperature: float, count: int) -> Cells:
    cells, mass = claimed_cells(*await _first_tokens(session, prompt, temperature, count))
    require(
        mass <= 1.0 + _MASS_ERROR,
        f"at temperature {temperature} the probabilities claimed for {len(cells.token_ids)} tokens sum to {mass:.3f}",
    )
    return cells


async def _frequencies(session: Session, temperature: float) -> str:
    """Sampled first tokens against their claims, at the prompt where claims that ignore the temperature show best."""
    _require_sampled_mode(session)

    def ignoring_temperature(cells: Cells) -> NDArray[np.float64]:
        return tempered(cells.probabilities, TEMPERATURE, session.info.signature.vocab_size)

    candidates = [session.prompt(100 + number) for number in range(_CANDIDATES)]
    first_look = [await _cells(session, prompt, temperature, _CANDIDATE_SAMPLES) for prompt in candidates]
    distances = [distance(ignoring_temperature(cells), cells.probabilities) for cells in first_look]
    prompt = candidates[int(np.argmax(distances))]
    # The size is settled from claims alone: a test that is repeated until it speaks would speak falsely too often.
    count = session.options.samples
    while True:
        cells = await _cells(session, prompt, temperature, count // 2)
        test = FrequencyTest(cells.probabilities, count)
        power = test.power(ignoring_temperature(cells))
        if power >= _POWER:
            break
        if 2 * count > _MOST_SAMPLES:
            raise NotSupportedError(f"even {count} samples could not tell raw log-probs apart on these prompts")
        count *= 2
    sampled, _ = await _first_tokens(session, prompt, temperature, count)
    p_value = test.p_value(cells.counts(sampled))
    require(
        p_value > FALSE_ALARM,
        f"at temperature {temperature} {count} sampled tokens do not have the claimed frequencies "
        f"(p = {p_value:.1e}, level {FALSE_ALARM:g}); most claimed {float(cells.probabilities[0]):.3f}, "
        f"sampled {float((sampled == cells.token_ids[0]).mean()):.3f}",
    )
    return (
        f"p = {p_value:.2f}, {count} samples, {len(cells.probabilities)} cells; "
        f"raw log-probs at {TEMPERATURE} would fail with {power:.3f}"
    )


async def _along_sequences(session: Session) -> str:
    _require_sampled_mode(session)
    if not session.info.max_topk:
        raise NotSupportedError("max_topk is 0, and without candidates nothing is known of what was not sampled")
    length = session.at_most(128)
    requests = [
        (session.prompt(200 + number), SamplingParams(max_tokens=length, temperature=TEMPERATURE, seed=seed, topk=1))
        for number, seed in enumerate(session.seeds(-(-_SEQUENCE_TOKENS // length)))
    ]
    claimed: list[float] = []
    happened: list[bool] = []
    for completion in await session.generate_all(requests):
        likeliest = completion.values(ColumnKind.TOPK_TOKEN_IDS)[:, 0]
        claimed += np.exp(completion.values(ColumnKind.TOPK_LOGPROBS)[:, 0].astype(np.float64)).tolist()
        happened += (completion.token_ids == likeliest).tolist()
    found = miscalibration(claimed, happened)
    if found is not None:
        raise Violation(
            f"the likeliest token, when claimed with a probability from {found.lowest:.1f} to {found.highest:.1f} "
            f"({found.claimed:.3f} on average), was sampled {found.observed:.3f} of {found.num_tokens} times"
        )
    return f"the likeliest token comes as often as claimed, over {len(claimed)} tokens of {len(requests)} sequences"


_at_one = partial(_frequencies, temperature=1.0)
_below_one = partial(_frequencies, temperature=TEMPERATURE)

REQUIREMENTS = (
    Requirement("SEED-1", "equal seeds give equal samples on equal weights", _equal, WHOLE),
    Requirement("SEED-2", "all 64 bits of a seed count", _whole, WHOLE),
    Requirement("LOGPROB-1", "at temperature 1 tokens come as often as claimed", _at_one, WHOLE),
    Requirement("LOGPROB-2", f"at {TEMPERATURE} too: the temperature is included", _below_one, WHOLE),
    Requirement(
        "LOGPROB-3", "and at every position of a sequence", _along_sequences, (*WHOLE, "RECORD-1", "LOGPROB-2")
    ),
)
