"""LOGPROB: are the log-probs those of the distribution really sampled from? Tests against sampled frequencies."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from leeway.conformance.requirement import Requirement
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
from leeway.conformance.violation import NotSupportedError, Violation, require
from leeway.types import ColumnKind, Int32Array, LogprobMode, SamplingParams

TEMPERATURE = 0.7
"""Away from 1, where the raw and the sampled distribution are the same."""
_CANDIDATES, _CANDIDATE_SAMPLES = 4, 32
_POWER = 0.999
_MOST_SAMPLES = 8192
_MASS_ERROR = 0.005
_SEQUENCE_TOKENS = 3000


@dataclass(frozen=True, slots=True)
class _Sampled:
    """First tokens after one prompt, and what was claimed for them; both [n]."""

    token_ids: Int32Array
    logprobs: np.ndarray[tuple[int], np.dtype[np.float32]]


def _require_sampled_mode(session: Session) -> None:
    if session.info.logprob_mode is not LogprobMode.SAMPLED:
        raise NotSupportedError(f"logprob_mode is {session.info.logprob_mode.name}")


async def _first_tokens(session: Session, prompt: Int32Array, temperature: float, count: int) -> _Sampled:
    requests = [
        (prompt, SamplingParams(max_tokens=1, temperature=temperature, seed=seed)) for seed in session.seeds(count)
    ]
    completions = await session.generate_all(requests)
    require(all(len(completion.logprobs) == 1 for completion in completions), "max_tokens 1 did not give one log-prob")
    return _Sampled(
        np.concatenate([completion.token_ids for completion in completions]),
        np.concatenate([completion.logprobs for completion in completions]),
    )


async def _cells(session: Session, prompt: Int32Array, temperature: float, count: int) -> Cells:
    sampled = await _first_tokens(session, prompt, temperature, count)
    cells, mass = claimed_cells(sampled.token_ids, sampled.logprobs)
    require(
        mass <= 1.0 + _MASS_ERROR,
        f"at temperature {temperature} the probabilities claimed for {len(cells.token_ids)} tokens sum to {mass:.3f}",
    )
    return cells


async def _frequencies(session: Session, temperature: float) -> str:
    """Sampled first tokens against their claims, at the prompt where claims that ignore the temperature show best."""
    _require_sampled_mode(session)
    vocab_size = session.info.signature.vocab_size

    def ignoring(cells: Cells) -> float:
        return distance(tempered(cells.probabilities, TEMPERATURE, vocab_size), cells.probabilities)

    candidates = [session.prompt(100 + number) for number in range(_CANDIDATES)]
    first_look = [await _cells(session, prompt, temperature, _CANDIDATE_SAMPLES) for prompt in candidates]
    prompt = candidates[int(np.argmax([ignoring(cells) for cells in first_look]))]
    # The size is settled from claims alone: a test that is repeated until it speaks would speak falsely too often.
    count = session.options.samples
    cells = await _cells(session, prompt, temperature, count // 2)
    test = FrequencyTest(cells.probabilities, count)
    while (power := test.power(tempered(cells.probabilities, TEMPERATURE, vocab_size))) < _POWER:
        count *= 2
        if count > _MOST_SAMPLES:
            raise NotSupportedError(f"even {count // 2} samples could not tell raw log-probs apart on these prompts")
        cells = await _cells(session, prompt, temperature, count // 2)
        test = FrequencyTest(cells.probabilities, count)
    sampled = await _first_tokens(session, prompt, temperature, count)
    p_value = test.p_value(cells.counts(sampled.token_ids))
    if p_value <= FALSE_ALARM:
        raise Violation(
            f"at temperature {temperature} {count} sampled tokens do not have the claimed frequencies "
            f"(p = {p_value:.1e}, level {FALSE_ALARM:g}); most claimed {float(cells.probabilities[0]):.3f}, "
            f"sampled {float((sampled.token_ids == cells.token_ids[0]).mean()):.3f}"
        )
    return (
        f"p = {p_value:.2f}, {count} samples, {len(cells.probabilities)} cells; "
        f"raw log-probs at {TEMPERATURE} would fail with {power:.3f}"
    )


async def _at_one(session: Session) -> str:
    return await _frequencies(session, 1.0)


async def _at_another_temperature(session: Session) -> str:
    return await _frequencies(session, TEMPERATURE)


async def _along_sequences(session: Session) -> str:
    _require_sampled_mode(session)
    if not session.info.max_topk:
        raise NotSupportedError("max_topk is 0, and without candidates nothing is known of what was not sampled")
    length = min(128, session.long_tokens)
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


REQUIREMENTS = (
    Requirement("LOGPROB-1", "at temperature 1 tokens come as often as claimed", _at_one, needs=WHOLE),
    Requirement(
        "LOGPROB-2", f"at {TEMPERATURE} too: the temperature is included", _at_another_temperature, needs=WHOLE
    ),
    Requirement(
        "LOGPROB-3", "and at every position of a sequence", _along_sequences, (*WHOLE, "RECORD-1", "LOGPROB-2")
    ),
)
