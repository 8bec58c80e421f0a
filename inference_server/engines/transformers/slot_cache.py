"""A KV cache with one row per running sequence, each row at its own length.

Rows 0..n-1 are the running sequences, so one decode step reads a plain slice. transformers calls `SlotLayer.update`
in every layer of a forward; what it does there was announced for the whole forward:

    announce_prefill: new rows; keys of prompt i are copied to each row that starts with that prompt, attention stays
        in the prompt
    announce_decode:  one token per running row, written at the row's own position; attention reads the rows' past

The engine's one module that imports transformers. What lies beyond a row's position is stale, finite, and masked by
the caller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass(slots=True)
class _Forward:
    """The writes and reads of the next forward pass; shared by all layers."""

    capacity: int  # tokens per row
    first_row: int = 0
    sources: torch.Tensor | None = None  # [m] prompt of each new row; None in a decode step
    rows: torch.Tensor | None = None  # [n] 0..n-1
    positions: torch.Tensor | None = None  # [n] where each row writes
    kv_length: int = 0


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, [rows, kv_heads, capacity, head_dim].

    Their sizes may differ: latent attention (DeepSeek-V3) keeps one head of [kv_lora_rank] latents and one of
    [qk_rope_head_dim] rotary keys instead, from which each forward computes keys and values with its own weights.
    """

    is_sliding = False

    def __init__(self, num_rows: int, forward: _Forward) -> None:
        super().__init__()
        self._num_rows = num_rows
        self._forward = forward

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        # Zeros, not empty: a masked position has weight 0, and 0 * NaN would still poison the row.
        self.keys = self._zeros(key_states)
        self.values = self._zeros(value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [B, kv_heads, q, head_dim] as announced; return what attention reads."""
        if self.keys is None or self.values is None:
            self.lazy_initialization(key_states, value_states)
        keys, values = cast("tuple[torch.Tensor, torch.Tensor]", (self.keys, self.values))
        forward = self._forward
        if forward.sources is not None:
            rows = slice(forward.first_row, forward.first_row + forward.sources.shape[0])
            keys[rows, :, : key_states.shape[2]] = key_states[forward.sources]
            values[rows, :, : value_states.shape[2]] = value_states[forward.sources]
            return key_states, value_states
        keys[forward.rows, :, forward.positions] = key_states[:, :, 0]
        values[forward.rows, :, forward.positions] = value_states[:, :, 0]
        num_rows = key_states.shape[0]
        return keys[:num_rows, :, : forward.kv_length], values[:num_rows, :, : forward.kv_length]

    def grow(self) -> None:
        """Take the announced capacity over."""
        if self.keys is None or self.values is None:
            return
        keys, values = self._zeros(self.keys), self._zeros(self.values)
        keys[:, :, : self.keys.shape[2]] = self.keys
        values[:, :, : self.values.shape[2]] = self.values
        self.keys, self.values = keys, values

    def move(self, source: int, target: int, num_tokens: int) -> None:
        """Copy a row's first tokens over another row."""
        if self.keys is not None and self.values is not None:
            self.keys[target, :, :num_tokens] = self.keys[source, :, :num_tokens]
            self.values[target, :, :num_tokens] = self.values[source, :, :num_tokens]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._forward.kv_length or query_length, 0

    def get_seq_length(self) -> int:
        return self._forward.kv_length

    def get_max_length(self) -> int:
        return self._forward.capacity

    def _zeros(self, like: torch.Tensor) -> torch.Tensor:
        return like.new_zeros((self._num_rows, like.shape[1], self._forward.capacity, like.shape[3]))


class SlotCache(Cache):
    """The layers' rows, grown by doubling up to the context length.

    Args:
        num_layers: attention layers of the model.
        num_rows: most running sequences.
        context_length: most tokens of a row.
    """

    def __init__(self, num_layers: int, num_rows: int, context_length: int) -> None:
        self._context_length = context_length
        self._forward = _Forward(capacity=min(64, context_length))
        self._slots = [SlotLayer(num_rows, self._forward) for _ in range(num_layers)]
        super().__init__(layers=list(self._slots))

    def announce_prefill(self, first_row: int, sources: torch.Tensor, num_tokens: int) -> None:
        """The next forward fills rows first_row... from prompts `sources` [m], padded to `num_tokens`."""
        self._reserve(num_tokens)
        self._forward.first_row = first_row
        self._forward.sources = sources
        self._forward.kv_length = 0

    def announce_decode(self, positions: torch.Tensor, kv_length: int) -> None:
        """The next forward feeds row i its token at `positions[i]` [n]; `kv_length` is the largest of them plus 1."""
        self._reserve(kv_length)
        self._forward.sources = None
        self._forward.rows = torch.arange(positions.shape[0])
        self._forward.positions = positions
        self._forward.kv_length = kv_length

    def move(self, source: int, target: int, num_tokens: int) -> None:
        """Copy a row's first tokens over another row, in every layer."""
        for layer in self._slots:
            layer.move(source, target, num_tokens)

    def _reserve(self, num_tokens: int) -> None:
        if num_tokens <= self._forward.capacity:
            return
        self._forward.capacity = min(max(2 * self._forward.capacity, num_tokens), self._context_length)
        for layer in self._slots:
            layer.grow()
