"""Packs trajectories of uneven length into rows, and rows into micro-batches. Pure NumPy.

    lengths ── plan_micro_batches ──> [[row, row], [row], ...] ── pack ──> MicroBatch: rectangles and flat targets
                                      row = trajectories one after the other

A row is at most max(longest trajectory, row_tokens) wide, so the attention mask is rows x width x width and never
spans the batch. Within a row every trajectory is its own segment with positions from 0, and attends only to itself.
The log-probability of token i is predicted at position i - 1, so targets carry both places; a trajectory's first
token is never a target.

Shape legend: R rows, W width of a row, N targets of a micro-batch, L MoE layers, k experts per token, K candidates per
token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leeway.errors import InvalidDataError
from leeway.types import SegmentKind, Trajectory

Int64Array = NDArray[np.int64]

PADDING_SEGMENT = -1


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward pass. Flat places count row by row: place = row * W + column."""

    token_ids: Int64Array  # [R, W], 0 at padding
    position_ids: Int64Array  # [R, W], from 0 in each trajectory; 0 at padding
    segment_ids: NDArray[np.int32]  # [R, W], 0, 1, ... within a row; PADDING_SEGMENT at padding
    target_places: Int64Array  # [N] flat place whose output predicts the target, one before the token itself
    target_token_ids: Int64Array  # [N]
    target_sequences: Int64Array  # [N] index of the trajectory in the step
    behavior_logprobs: NDArray[np.float32]  # [N] log mu of the targets
    temperatures: NDArray[np.float32]  # [N] at which the targets were sampled
    routing: Int64Array | None  # [R * W, L, k] expert ids, 0 where nothing was routed
    routed: NDArray[np.bool_] | None  # [R * W] whether a place has routing; not the last tokens, not padding
    topk_token_ids: Int64Array | None = None  # [N, K] recorded candidates of the targets, the likeliest first
    topk_behavior_logprobs: NDArray[np.float32] | None = None  # [N, K] log mu of the candidates
    staleness: Int64Array | None = None  # [N] of the targets, in optimizer steps

    def place_sequences(self) -> tuple[Int64Array, int]:
        """[R * W] which trajectory of this micro-batch a place belongs to, -1 at padding; and how many there are.

        Example:
            segments [[0, 0, 1], [0, -1, -1]]: [0, 0, 1, 2, -1, -1] of 3.
        """
        per_row = self.segment_ids.max(axis=1).astype(np.int64) + 1
        before = np.cumsum(per_row) - per_row
        sequences = np.where(self.segment_ids == PADDING_SEGMENT, -1, self.segment_ids + before[:, None])
        return sequences.reshape(-1), int(per_row.sum())


def pack_rows(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """First-fit decreasing: each sequence goes into the first row with room, longest first; ties keep their order.

    Args:
        lengths: tokens of each sequence, at least 1 each.
        row_tokens: wished width; rows are as wide as the longest sequence where that is more.

    Returns:
        Indices into `lengths` by row, fullest rows first.

    Example:
        lengths [3, 7, 5, 2, 3], row_tokens 10 gives [[1, 0], [2, 4, 3]].
    """
    if len(lengths) == 0:
        return []
    sizes = np.asarray(lengths, dtype=np.int64)
    capacity = max(int(sizes.max()), row_tokens)
    room = np.full(len(lengths), capacity, dtype=np.int64)  # no more rows than sequences
    rows: list[list[int]] = []
    for index in np.argsort(-sizes, kind="stable").tolist():
        row = int(np.argmax(room >= sizes[index]))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        room[row] -= sizes[index]
    fullest_first = np.argsort(room[: len(rows)], kind="stable")
    return [rows[row] for row in fullest_first.tolist()]


def plan_micro_batches(lengths: Sequence[int], row_tokens: int, micro_batch_tokens: int) -> list[list[list[int]]]:
    """Cut packed rows into micro-batches whose rectangle holds at most `micro_batch_tokens`, or a single row.

    Example:
        lengths [4, 4, 4], row_tokens 4, micro_batch_tokens 8 gives [[[0], [1]], [[2]]].
    """
    batches: list[list[list[int]]] = []
    width = 0
    for row in pack_rows(lengths, row_tokens):
        used = sum(lengths[index] for index in row)
        if batches and max(width, used) * (len(batches[-1]) + 1) <= micro_batch_tokens:
            batches[-1].append(row)
            width = max(width, used)
        else:
            batches.append([row])
            width = used
    return batches


def pack(
    rows: Sequence[Sequence[int]],
    trajectories: Sequence[Trajectory],
    *,
    with_routing: bool = False,
    topk: int = 0,
    staleness: Sequence[Int64Array] | None = None,
) -> MicroBatch:
    """Lay the trajectories of some rows out as rectangles.

    Args:
        rows: indices into `trajectories`, as planned.
        trajectories: all of the step's.
        with_routing: whether to carry routing; then every trajectory has it.
        topk: K of the candidates to carry, 0 for none; every trajectory has recorded at least as many.
        staleness: [n] of each of `trajectories`, to be carried.
    """
    width = max(sum(trajectories[index].num_tokens for index in row) for row in rows)
    shape = (len(rows), width)
    token_ids = np.zeros(shape, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    segment_ids = np.full(shape, PADDING_SEGMENT, dtype=np.int32)
    routing, routed = _empty_routing(rows, trajectories, width) if with_routing else (None, None)
    places: list[Int64Array] = []
    order: list[int] = []
    for row, members in enumerate(rows):
        column = 0
        for segment, index in enumerate(members):
            trajectory = trajectories[index]
            end = column + trajectory.num_tokens
            token_ids[row, column:end] = trajectory.token_ids
            position_ids[row, column:end] = np.arange(trajectory.num_tokens)
            segment_ids[row, column:end] = segment
            start = row * width + column
            if routing is not None and routed is not None and trajectory.routing is not None:
                rows_with_routing = slice(start, start + trajectory.num_tokens - 1)
                routing[rows_with_routing] = trajectory.routing
                routed[rows_with_routing] = True
            places.append(start - 1 + np.flatnonzero(trajectory.loss_mask))
            order.append(index)
            column = end
    packed = [trajectories[index] for index in order]
    masks = [trajectory.loss_mask for trajectory in packed]
    candidates = [likeliest_candidates(trajectory, topk) for trajectory in packed] if topk else None
    return MicroBatch(
        token_ids=token_ids,
        position_ids=position_ids,
        segment_ids=segment_ids,
        target_places=np.concatenate(places),
        target_token_ids=np.concatenate([t.token_ids[m] for t, m in zip(packed, masks, strict=True)]).astype(np.int64),
        target_sequences=np.repeat(np.asarray(order, dtype=np.int64), [int(mask.sum()) for mask in masks]),
        behavior_logprobs=np.concatenate([t.behavior_logprobs[m] for t, m in zip(packed, masks, strict=True)]),
        temperatures=np.concatenate([token_temperatures(t)[m] for t, m in zip(packed, masks, strict=True)]),
        routing=routing,
        routed=routed,
        topk_token_ids=None if candidates is None else np.concatenate([ids for ids, _ in candidates]),
        topk_behavior_logprobs=None if candidates is None else np.concatenate([logs for _, logs in candidates]),
        staleness=None
        if staleness is None
        else np.concatenate([staleness[index][mask] for index, mask in zip(order, masks, strict=True)]),
    )


def likeliest_candidates(trajectory: Trajectory, topk: int) -> tuple[Int64Array, NDArray[np.float32]]:
    """Ids and behavior log-probs [trained tokens, K] of the K likeliest recorded candidates; ties keep their order.

    Raises:
        InvalidDataError: the trajectory has no candidates.
    """
    if trajectory.topk_token_ids is None or trajectory.topk_logprobs is None:
        raise InvalidDataError(f"trajectory {trajectory.trajectory_id} has no recorded candidates; set sampling.topk")
    token_ids = trajectory.topk_token_ids[trajectory.loss_mask].astype(np.int64)
    logprobs = trajectory.topk_logprobs[trajectory.loss_mask]
    order = np.argsort(-logprobs, axis=-1, kind="stable")[:, :topk]
    return np.take_along_axis(token_ids, order, axis=-1), np.take_along_axis(logprobs, order, axis=-1)


def token_temperatures(trajectory: Trajectory) -> NDArray[np.float32]:
    """[n] softmax temperature of each sampled token; 1 where a segment does not say."""
    temperatures = np.ones(trajectory.num_tokens, dtype=np.float32)
    for segment in trajectory.segments:
        if segment.kind is SegmentKind.MODEL and segment.sampling is not None:
            temperatures[segment.start_token : segment.end_token] = segment.sampling.temperature
    return temperatures


def _empty_routing(
    rows: Sequence[Sequence[int]], trajectories: Sequence[Trajectory], width: int
) -> tuple[Int64Array, NDArray[np.bool_]]:
    first: NDArray[Any] | None = trajectories[rows[0][0]].routing
    layers_and_slots = (0, 0) if first is None else first.shape[1:]
    places = len(rows) * width
    return np.zeros((places, *layers_and_slots), dtype=np.int64), np.zeros(places, dtype=np.bool_)
