"""Converts the outputs of vLLM into columns, and seeds into the form that it takes. Needs NumPy only.

vLLM lists for each sampled token its own log-prob, then those of the K most likely tokens. Where it has merged several
outputs into one, because the first was not fetched yet, a sampled token that is one of the K is listed only once.

Shape legend: n tokens, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from leeway.errors import UnavailableError
from leeway.types import Column, ColumnKind, Float32Array, Int32Array


class FlatLogprobs(Protocol):
    """`vllm.logprobs.FlatLogprobs`: the entries of all tokens in one list, with where each token's begin and end."""

    start_indices: list[int]
    end_indices: list[int]
    token_ids: list[int]
    logprobs: list[float]


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """Sampled tokens with their log-probs and candidates, most likely first."""

    token_ids: Int32Array  # [n]
    logprobs: Float32Array  # [n]
    topk_token_ids: Int32Array  # [n, K]
    topk_logprobs: Float32Array  # [n, K]

    def columns(self, start: int) -> list[Column]:
        """Columns of the tokens from `start` on."""
        values = {ColumnKind.TOKEN_IDS: self.token_ids, ColumnKind.BEHAVIOR_LOGPROBS: self.logprobs}
        if self.topk_token_ids.shape[1]:
            values |= {ColumnKind.TOPK_TOKEN_IDS: self.topk_token_ids, ColumnKind.TOPK_LOGPROBS: self.topk_logprobs}
        return [Column(kind, start, start + len(self.token_ids), array) for kind, array in values.items()]


def signed_seed(seed: int) -> int:
    """An unsigned 64-bit seed as the signed one that vLLM takes; to it -1 means none, so that seed shares another's."""
    signed = seed if seed < 1 << 63 else seed - (1 << 64)
    return signed if signed != -1 else -(1 << 63)


def sampled_tokens(token_ids: Sequence[int], listed: FlatLogprobs, topk: int) -> SampledTokens:
    """Split the output of vLLM for n sampled tokens.

    Raises:
        UnavailableError: vLLM has listed other tokens or candidates than requested.
    """
    num_tokens = len(token_ids)
    ids = np.array(token_ids, np.int32)
    starts, ends = listed.start_indices, listed.end_indices
    listed_ids, listed_logprobs = np.array(listed.token_ids, np.int32), np.array(listed.logprobs, np.float32)
    if len(starts) != num_tokens or (listed_ids[starts] != ids).any():
        raise UnavailableError(f"vLLM sent {num_tokens} tokens with the log-probs of others")
    if len(listed_ids) == num_tokens * (topk + 1):
        by_token = (num_tokens, topk + 1)
        candidate_ids = listed_ids.reshape(by_token)[:, 1:]
        candidate_logprobs = listed_logprobs.reshape(by_token)[:, 1:]
    else:
        candidate_ids = np.empty((num_tokens, topk), np.int32)
        candidate_logprobs = np.empty((num_tokens, topk), np.float32)
        for token, (start, end) in enumerate(zip(starts, ends, strict=True)):
            if end - start == topk + 1:
                start += 1  # the sampled token is listed again if it is a candidate
            elif end - start != topk:
                raise UnavailableError(f"vLLM listed {end - start} candidates where top-{topk} was asked for")
            order = start + np.argsort(-listed_logprobs[start:end], kind="stable")
            candidate_ids[token], candidate_logprobs[token] = listed_ids[order], listed_logprobs[order]
    return SampledTokens(ids, listed_logprobs[starts], candidate_ids.copy(), candidate_logprobs.copy())
