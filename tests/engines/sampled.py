"""Completions as engines stream them, and what transformers computes for the same tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from inference_server.engine import Engine, GenerationEnd, GenerationRequest
from leeway.types import Array, Column, ColumnKind, Int32Array, SamplingParams, VersionSpan

TIE = 2e-5  # between router logits: some ten times what engines differ by
PATIENCE_SECONDS = 600.0  # far beyond what anything takes on a busy machine


@dataclass
class Completion:
    """Everything an engine said of one request."""

    prompt: Int32Array
    sampling: SamplingParams
    columns: list[Column] = field(default_factory=list)
    spans: list[VersionSpan] = field(default_factory=list)
    end: GenerationEnd | None = None

    def column(self, kind: ColumnKind) -> Array:
        """A column, whole; its pieces must follow each other without a gap."""
        pieces = [column for column in self.columns if column.kind is kind]
        start = 0 if kind is ColumnKind.ROUTING else len(self.prompt)
        for piece in pieces:
            assert piece.start_token == start
            start = piece.end_token
        return np.concatenate([piece.values for piece in pieces])

    @property
    def token_ids(self) -> Int32Array:
        return self.column(ColumnKind.TOKEN_IDS)

    @property
    def num_sampled(self) -> int:
        return sum(len(column.values) for column in self.columns if column.kind is ColumnKind.TOKEN_IDS)

    def steps(self) -> list[int]:
        """The step of the version of each sampled token; every one has exactly one."""
        steps: list[int] = []
        for span in self.spans:
            assert span.start_token == len(self.prompt) + len(steps)
            steps += [span.version.step] * (span.end_token - span.start_token)
        assert len(steps) == len(self.token_ids)
        return steps


async def sample(
    engine: Engine,
    prompt: Int32Array,
    sampling: SamplingParams,
    on_chunk: Callable[[Completion], object] = lambda completion: None,
) -> Completion:
    completion = Completion(prompt, sampling)
    async with (
        asyncio.timeout(PATIENCE_SECONDS),
        aclosing(engine.generate(GenerationRequest("test", prompt, sampling))) as events,
    ):
        async for event in events:
            assert completion.end is None
            if isinstance(event, GenerationEnd):
                completion.end = event
                continue
            completion.columns += event.columns
            completion.spans += event.version_spans
            on_chunk(completion)
    assert completion.end is not None
    assert completion.end.num_tokens == len(completion.token_ids)
    return completion


@dataclass(frozen=True)
class Reference:
    """What a transformers model computes for a completion."""

    logprobs: Array  # [n]
    best: Array  # [n], of the likeliest token
    topk_token_ids: Array  # [n, K]
    candidates: Array  # [n, K]: of the candidates that the engine lists
    routing: Array | None  # [prompt + n - 1, L, k], each token's experts in order of their ids
    num_decided: int  # leading tokens of prompt and completion whose experts rounding does not decide

    def decided(self) -> Array:
        """Which sampled tokens an engine must agree on; [n] bool. Behind a tie of experts, it may rightly differ."""
        num_sampled = len(self.logprobs)
        num_prompt = 0 if self.routing is None else len(self.routing) + 1 - num_sampled
        return np.arange(num_prompt, num_prompt + num_sampled) <= self.num_decided


def reference(model: PreTrainedModel, completion: Completion) -> Reference:
    prompt, token_ids, topk = len(completion.prompt), completion.token_ids, completion.sampling.topk
    sequence = torch.tensor(np.concatenate([completion.prompt, token_ids]))[None].long()
    moe = hasattr(model.config, "num_experts_per_tok")
    with torch.no_grad():
        output: Any = model(sequence, **({"output_router_logits": True} if moe else {}))
    logits = output.logits[0, prompt - 1 : -1].float() / completion.sampling.temperature
    logprobs = torch.log_softmax(logits, dim=-1)
    listed = (
        torch.tensor(completion.column(ColumnKind.TOPK_TOKEN_IDS)).long() if topk else torch.zeros(len(token_ids), 0)
    )
    routing, num_decided = None, sequence.shape[1]
    if moe:
        experts = int(model.config.num_experts_per_tok)
        # [tokens, L, E], of every token but the last, which nothing was sampled from.
        routers = torch.stack([each.reshape(-1, each.shape[-1])[:-1] for each in output.router_logits], dim=1)
        likeliest = routers.topk(experts + 1)
        routing = likeliest.indices[..., :experts].sort(-1).values.numpy()
        tied = (likeliest.values[..., -2] - likeliest.values[..., -1] < TIE).any(-1).nonzero()
        num_decided = int(tied[0]) if len(tied) else num_decided
    return Reference(
        logprobs=logprobs.gather(1, torch.tensor(token_ids).long()[:, None])[:, 0].numpy(),
        best=logprobs.max(-1).values.numpy(),
        topk_token_ids=logprobs.topk(topk).indices.numpy(),
        candidates=logprobs.gather(1, listed.long()).numpy(),
        routing=routing,
        num_decided=num_decided,
    )


def difference(completion: Completion, model: PreTrainedModel) -> Array:
    """|log mu - log pi| of each sampled token."""
    return np.abs(completion.column(ColumnKind.BEHAVIOR_LOGPROBS) - reference(model, completion).logprobs)
