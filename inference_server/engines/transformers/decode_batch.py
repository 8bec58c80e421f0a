"""The running sequences, and the two forward passes that sample for them. Belongs to one thread and has no locks.

Rows 0..n-1 of the KV cache are the running sequences. `admit` feeds whole prompts and samples each sequence's first
token; `step` feeds every running sequence the token it sampled last and samples the next. Equal prompts are fed once.
A finished row is filled with the last one, so the rows stay dense.

Shape legend: n running rows, m new rows, U different prompts among them, P longest of those prompts, V vocabulary, L
MoE layers, k experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from inference_server.engines.transformers.decode_sequence import DecodeSequence
from inference_server.engines.transformers.routing_capture import RoutingCapture
from inference_server.engines.transformers.sampling import Sampled, sample, uniforms
from inference_server.engines.transformers.slot_cache import SlotCache
from leeway.types import Array, FinishReason, PolicyVersion


class DecodeBatch:
    """Continuous batching over the rows of a SlotCache.

    Args:
        model: a transformers causal language model with full attention in every layer.
        num_layers: how many attention layers it has.
        capture: the model's routing.
        max_rows: most running sequences.
        context_length: most tokens of a sequence.
        prefill_tokens: most prompt tokens, padding included, in one forward (a single longer prompt goes alone).
    """

    def __init__(
        self,
        model: torch.nn.Module,
        num_layers: int,
        capture: RoutingCapture,
        max_rows: int,
        context_length: int,
        prefill_tokens: int,
    ) -> None:
        self._model = model
        self._capture = capture
        self._cache = SlotCache(num_layers, max_rows, context_length)
        self._prefill_tokens = prefill_tokens
        self._max_rows = max_rows
        self._rows: list[DecodeSequence] = []

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    @property
    def num_free(self) -> int:
        return self._max_rows - len(self._rows)

    def running(self) -> tuple[DecodeSequence, ...]:
        """The running sequences, in row order."""
        return tuple(self._rows)

    def admit(self, sequences: Sequence[DecodeSequence], version: PolicyVersion) -> None:
        """Give each sequence a row, feed its prompt, sample its first token."""
        for part in self._prefill_parts(sequences):
            self._prefill(part, version)

    def step(self, version: PolicyVersion) -> None:
        """Sample the next token of every row."""
        lengths = [sequence.length for sequence in self._rows]
        positions = torch.tensor(lengths) - 1  # [n]
        kv_length = max(lengths)
        self._cache.announce_decode(positions, kv_length)
        visible = torch.arange(kv_length) <= positions[:, None]  # [n, kv_length]
        output = self._model(
            input_ids=torch.tensor([sequence.last_token for sequence in self._rows])[:, None],
            position_ids=positions[:, None],
            attention_mask=visible[:, None, None, :],
            past_key_values=self._cache,
            use_cache=True,
        )
        routing = self._take_routing(self._rows)
        if routing is not None:
            for row, sequence in enumerate(self._rows):
                sequence.route(routing[row : row + 1])
        self._sample(self._rows, output.logits[:, -1], version)

    def remove_if(self, ends: Callable[[DecodeSequence], bool]) -> list[DecodeSequence]:
        """Free the rows of the sequences that `ends` names; return them."""
        removed: list[DecodeSequence] = []
        for row in reversed(range(len(self._rows))):
            if ends(self._rows[row]):
                removed.append(self._rows[row])
                self._free(row)
        return removed

    def finished(self) -> list[tuple[DecodeSequence, FinishReason]]:
        """Free the rows of the sequences that end with their last token; return them with the reason."""
        reasons = {sequence: reason for sequence in self._rows if (reason := sequence.finish_reason()) is not None}
        self.remove_if(lambda sequence: sequence in reasons)
        return list(reasons.items())

    def _prefill_parts(self, sequences: Sequence[DecodeSequence]) -> Iterator[list[DecodeSequence]]:
        """Split new sequences, shortest prompt first, so that each part's different prompts fit one forward."""
        part: list[DecodeSequence] = []
        prompts: set[bytes] = set()
        for sequence in sorted(sequences, key=lambda sequence: sequence.prompt_length):
            key = sequence.prompt.tobytes()
            if part and len(prompts | {key}) * sequence.prompt_length > self._prefill_tokens:
                yield part
                part, prompts = [], set()
            part.append(sequence)
            prompts.add(key)
        if part:
            yield part

    def _prefill(self, sequences: Sequence[DecodeSequence], version: PolicyVersion) -> None:
        prompt_index = {key: index for index, key in enumerate(dict.fromkeys(s.prompt.tobytes() for s in sequences))}
        sources = [prompt_index[sequence.prompt.tobytes()] for sequence in sequences]  # [m]
        longest = max(sequence.prompt_length for sequence in sequences)
        token_ids = torch.zeros((len(prompt_index), longest), dtype=torch.long)  # [U, P], right-padded
        for sequence, source in zip(sequences, sources, strict=True):
            token_ids[source, : sequence.prompt_length] = torch.from_numpy(sequence.prompt)
        kept = sorted({sequence.prompt_length - 1 for sequence in sequences})  # where some prompt ends
        kept_index = [kept.index(sequence.prompt_length - 1) for sequence in sequences]  # [m]
        self._cache.announce_prefill(len(self._rows), torch.tensor(sources), longest)
        output = self._model(
            input_ids=token_ids,
            position_ids=torch.arange(longest)[None],
            # Causality alone keeps the right padding out of every prompt.
            attention_mask=torch.ones((1, 1, longest, longest), dtype=torch.bool).tril_(),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=torch.tensor(kept),
        )
        routing = self._take_routing(sequences)
        for sequence, source in zip(sequences, sources, strict=True):
            sequence.start()
            if routing is not None:
                prompt_rows = slice(source * longest, source * longest + sequence.prompt_length)
                sequence.route(routing[prompt_rows])
        self._rows.extend(sequences)
        self._sample(sequences, output.logits[sources, kept_index], version)

    def _take_routing(self, sequences: Sequence[DecodeSequence]) -> Array | None:
        """Routing of the forward that has just run, [tokens, L, k]; None when no sequence records it."""
        if any(sequence.records_routing for sequence in sequences):
            return self._capture.take()
        self._capture.discard()
        return None

    def _sample(self, sequences: Sequence[DecodeSequence], logits: torch.Tensor, version: PolicyVersion) -> None:
        """Sample and append one token per sequence from [rows, V]."""
        draws = uniforms(
            np.array([sequence.seed for sequence in sequences], np.uint64),
            np.array([sequence.length for sequence in sequences], np.uint64),
        )
        temperatures = torch.tensor([sequence.temperature for sequence in sequences])
        topk = max(sequence.topk for sequence in sequences)
        sampled = sample(logits, temperatures, draws, topk)
        tokens, logprobs = sampled.token_ids.tolist(), sampled.logprobs.tolist()
        for sequence, token_id, logprob in zip(sequences, tokens, logprobs, strict=True):
            sequence.append(token_id, logprob, version)
        if topk:
            self._append_candidates(sequences, sampled)

    def _append_candidates(self, sequences: Sequence[DecodeSequence], sampled: Sampled) -> None:
        if sampled.topk_token_ids is None or sampled.topk_logprobs is None:
            return
        for sequence, token_ids, logprobs in zip(sequences, sampled.topk_token_ids, sampled.topk_logprobs, strict=True):
            if sequence.topk:
                sequence.append_candidates(token_ids, logprobs)

    def _free(self, row: int) -> None:
        last = self._rows.pop()
        if row < len(self._rows):
            self._cache.move(len(self._rows), row, last.length)
            self._rows[row] = last
