"""The vocabulary-wide numbers of a few tokens, in one buffer that is written once and turned into gradients in place.

    tile of W ── h W^T / temperature ──> z = logit - shift ──> E = exp(z), kept ──> sums S = sum E, X = sum E z
    after the last tile:   log-sum-exp = shift + log S,   entropy = log S - X / S,   p = E / S
    gradients, tile by tile:   G = E with S c taken off at the sampled token
                               d hidden += a G W,   d W += G^T (a h),   a = -c / (S temperature)

The probabilities are never normalised: 1 / S and the coefficient c go into [C, H] matrices on either side. `shift` is
any number per row that keeps exp from overflowing; it starts as the first tile's maximum, and where a later logit lies
far above it, what is already there is scaled down once. Tiles of the vocabulary are narrow enough for every
elementwise step to run in the cache that the matrix product has just filled.

Shape legend: C tokens of a chunk, n of them with a gradient, H hidden size, V vocabulary, W width of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from learner.policy.head import Head

_TILE_WIDTH = {"cpu": 1024}
_WIDE_TILE = 16384  # elsewhere, where a launch costs more than what a cache saves
_HEADROOM = 40.0  # a logit may lie this far above the shift: exp(40) * V is far from overflow


@dataclass(frozen=True, slots=True)
class Gradients:
    """Where gradients are added up, in the head's compute dtype."""

    hidden: Tensor  # [T, H], overwritten
    weight: Tensor | None  # [V, H], added to; None for a frozen head
    bias: Tensor | None  # [V], added to


@dataclass(frozen=True, slots=True)
class ChunkSums:
    """Sums of each token after the last tile."""

    log_total: Tensor  # [C] log S
    total: Tensor  # [C] S
    wanted_logprobs: Tensor  # [C, 1 + K]
    entropies: Tensor  # [C]


@dataclass(frozen=True, slots=True)
class Coefficients:
    """Derivatives of the loss for each token of a chunk."""

    logprob: Tensor  # [C] d loss / d log pi of the sampled token
    entropy: Tensor | None  # [C] d loss / d entropy

    def nonzero(self) -> Tensor:
        """[C] bool: whether there is any backward work. What is not a number counts as work, so that it shows."""
        return self.logprob != 0 if self.entropy is None else (self.logprob != 0) | (self.entropy != 0)


class Workspace:
    """The memory for chunks of at most `num_tokens`, used again for every chunk."""

    def __init__(self, head: Head, num_tokens: int, dtype: torch.dtype, *, with_gradient: bool) -> None:
        """Without gradients, one tile at a time is enough."""
        self.head = head
        self.dtype = dtype
        device = head.weight.device
        self.width = min(_TILE_WIDTH.get(device.type, _WIDE_TILE), head.vocabulary_size)
        self._tile_size = num_tokens * self.width
        self._kept = torch.empty(
            (math.ceil(head.vocabulary_size / self.width) if with_gradient else 1, self._tile_size),
            dtype=dtype,
            device=device,
        )
        self._scratch = torch.empty(self._tile_size, dtype=dtype, device=device)
        converts = head.weight.dtype != dtype
        self._weight = torch.empty((self.width, head.weight.shape[1]), dtype=dtype, device=device) if converts else None

    @property
    def keeps_all(self) -> bool:
        """True where the workspace holds all tiles of a chunk at once."""
        return self._kept.shape[0] * self.width >= self.head.vocabulary_size

    def tiles(self) -> Iterator[tuple[int, int, int]]:
        """(index, first id, end) of each tile of the vocabulary."""
        for index, start in enumerate(range(0, self.head.vocabulary_size, self.width)):
            yield index, start, min(start + self.width, self.head.vocabulary_size)

    def exponentials(self, index: int, num_tokens: int, width: int) -> Tensor:
        """[C, W] of a tile, contiguous."""
        return self._kept[index % self._kept.shape[0], : num_tokens * width].view(num_tokens, width)

    def logits(self, num_tokens: int, width: int) -> Tensor:
        """[C, W] scratch, contiguous."""
        return self._scratch[: num_tokens * width].view(num_tokens, width)

    def weight(self, start: int, end: int) -> Tensor:
        """[W, H] rows of the head's weight in the compute dtype."""
        rows = self.head.weight[start:end]
        return rows if self._weight is None else self._weight[: end - start].copy_(rows)


def accumulate_exponentials(
    space: Workspace, hidden: Tensor, inverse_temperatures: Tensor, wanted: Tensor
) -> ChunkSums:
    """Fill the workspace with E of a chunk, and sum it up.

    Args:
        space: for at least C tokens.
        hidden: [C, H] in the compute dtype, divided by the temperature.
        inverse_temperatures: [C].
        wanted: [C, 1 + K] ids whose log-probs are wanted.
    """
    num_tokens = hidden.shape[0]
    shift = torch.zeros((num_tokens, 1), dtype=space.dtype, device=hidden.device)
    # Tile sums are short; float64 keeps hundreds of them exact.
    total, expectation = torch.zeros((2, num_tokens), dtype=torch.float64, device=hidden.device)
    wanted_logits = torch.empty(wanted.numel(), dtype=space.dtype, device=hidden.device)
    entries = _EntriesByTile(wanted, space)
    for index, start, end in space.tiles():
        z = torch.mm(hidden, space.weight(start, end).t(), out=space.logits(num_tokens, end - start))
        if space.head.bias is not None:
            z.addcmul_(inverse_temperatures.unsqueeze(-1), space.head.bias[start:end].to(space.dtype))
        which, rows, columns = entries.of(index)
        wanted_logits[which] = z[rows, columns]
        highest = z.amax(dim=-1, keepdim=True)
        if index == 0:
            shift = highest
        elif bool((highest > shift + _HEADROOM).any()):
            shift = _raise_shift(space, index, shift, highest, total, expectation)
        exponentials = torch.exp(z.sub_(shift), out=space.exponentials(index, num_tokens, end - start))
        total += exponentials.sum(dim=-1)
        expectation += z.mul_(exponentials).sum(dim=-1)
    log_total = total.log()
    logprobs = (wanted_logits.view_as(wanted) - shift) - log_total.unsqueeze(-1)
    entropies = log_total - expectation / total
    return ChunkSums(
        log_total.to(space.dtype), total.to(space.dtype), logprobs.to(space.dtype), entropies.to(space.dtype)
    )


def _raise_shift(
    space: Workspace, index: int, shift: Tensor, highest: Tensor, total: Tensor, expectation: Tensor
) -> Tensor:
    """Scale what rows have collected before tile `index` to a higher shift [C, 1], where they need one."""
    raised = torch.where(highest > shift + _HEADROOM, highest, shift)
    difference = shift - raised
    factor = difference.exp()
    for earlier, start, end in space.tiles():
        if earlier == index or not space.keeps_all:
            break
        space.exponentials(earlier, shift.shape[0], end - start).mul_(factor)
    # X = sum E z, with E scaled and z lowered.
    expectation.add_(total * difference.squeeze(-1)).mul_(factor.squeeze(-1))
    total.mul_(factor.squeeze(-1))
    return raised


def accumulate_gradients(
    space: Workspace,
    hidden: Tensor,
    inverse_temperatures: Tensor,
    sampled: Tensor,
    sums: ChunkSums,
    coefficients: Coefficients,
    gradients: Gradients,
) -> None:
    """Turn the workspace's E into gradients; tokens whose coefficients are zero are left out of every product.

    Args:
        space: as `accumulate_exponentials` left it; its contents are used up.
        hidden: [C, H] divided by the temperature.
        inverse_temperatures: [C].
        sampled: [C] ids.
        sums: of the chunk.
        coefficients: of the chunk.
        gradients: `hidden` is this chunk's rows [C, H].
    """
    gradients.hidden.zero_()
    keep = _Compaction(coefficients.nonzero())
    if keep.num_rows == 0:
        return
    rows = keep.rows
    total, coefficient = sums.total[rows], coefficients.logprob[rows]
    entropy = None if coefficients.entropy is None else coefficients.entropy[rows]
    # G is -S / c times the gradient of the logits, or -S times it where the entropy takes part.
    scale = -1 / total if entropy is not None else -coefficient / total
    at_sampled = total * coefficient if entropy is not None else total
    scaled_hidden = hidden[rows] * scale.unsqueeze(-1)  # [n, H]
    row_scale = scale * inverse_temperatures[rows]
    hidden_gradient = torch.zeros_like(scaled_hidden)
    entries = _EntriesByTile(sampled[rows].unsqueeze(-1), space)
    for index, start, end in space.tiles():
        tile = keep.apply(space.exponentials(index, hidden.shape[0], end - start))
        if entropy is not None:
            _add_entropy_gradient(tile, coefficient, entropy, sums, rows)
        _, places, columns = entries.of(index)
        tile[places, columns] -= at_sampled[places]
        hidden_gradient.addmm_(tile, space.weight(start, end))
        if gradients.weight is not None:
            gradients.weight[start:end].addmm_(tile.t(), scaled_hidden)
        if gradients.bias is not None:
            gradients.bias[start:end].addmv_(tile.t(), row_scale)
    gradients.hidden[rows] = hidden_gradient.mul_(row_scale.unsqueeze(-1))


def _add_entropy_gradient(tile: Tensor, coefficient: Tensor, entropy: Tensor, sums: ChunkSums, rows: Tensor) -> None:
    """G = E (c + e (log E - log S + entropy)), as dH/dz = -p (log p + H); E log E is 0 where E is."""
    linear = coefficient + entropy * (sums.entropies[rows] - sums.log_total[rows])
    logarithmic = cast("Tensor", torch.special.entr(tile)).mul_(entropy.unsqueeze(-1))
    tile.mul_(linear.unsqueeze(-1)).sub_(logarithmic)


class _Compaction:
    """Moves the rows to keep to the front: rows from behind fill the holes, so that few move."""

    def __init__(self, keep: Tensor) -> None:
        self.num_rows = int(keep.sum())
        front = keep[: self.num_rows]
        self._holes = torch.nonzero(~front).squeeze(-1)
        self._tail = torch.nonzero(keep[self.num_rows :]).squeeze(-1) + self.num_rows
        self.rows = torch.arange(self.num_rows, device=keep.device)  # [n] where each row was
        self.rows[self._holes] = self._tail

    def apply(self, tile: Tensor) -> Tensor:
        """[n, W] of [C, W], in the same memory."""
        if self._holes.numel():
            tile.index_copy_(0, self._holes, tile.index_select(0, self._tail))
        return tile[: self.num_rows]


class _EntriesByTile:
    """Finds, for a tile of the vocabulary, which of a chunk's ids lie in it."""

    def __init__(self, token_ids: Tensor, space: Workspace) -> None:
        """`token_ids` is [n, m]."""
        ordered, self._order = token_ids.flatten().sort()
        self._rows = self._order // token_ids.shape[1]
        starts = torch.tensor([start for _, start, _ in space.tiles()], device=token_ids.device)
        self._columns = ordered % space.width
        self._bounds = [*cast("list[int]", torch.searchsorted(ordered, starts).tolist()), ordered.numel()]

    def of(self, tile: int) -> tuple[Tensor, Tensor, Tensor]:
        """(place in the flattened ids, row, column within the tile) of each id in a tile."""
        inside = slice(self._bounds[tile], self._bounds[tile + 1])
        return self._order[inside], self._rows[inside], self._columns[inside]
