"""Packing keeps every token once, apart, and in its place."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.batch.packing import PADDING_SEGMENT, pack, pack_rows, plan_micro_batches, token_temperatures
from learner.policy.model import attention_mask
from tests.harness.learner_builders import MOE, trajectory

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def test_worked_rows() -> None:
    assert pack_rows([3, 7, 5, 2, 3], 10) == [[1, 0], [2, 4, 3]]
    assert pack_rows([], 10) == []


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(1, 100), st.integers(1, 400))
def test_plan_places_each_sequence_once_within_the_budgets(lengths: list[int], row_tokens: int, budget: int) -> None:
    plan = plan_micro_batches(lengths, row_tokens, budget)
    assert sorted(index for rows in plan for row in rows for index in row) == list(range(len(lengths)))
    capacity = max(row_tokens, *lengths)
    for rows in plan:
        width = max(sum(lengths[index] for index in row) for row in rows)
        assert width <= capacity
        assert len(rows) == 1 or width * len(rows) <= budget


@settings(max_examples=50, deadline=None)
@given(LENGTHS, st.integers(1, 100))
def test_first_fit_leaves_no_two_rows_that_fit_together(lengths: list[int], row_tokens: int) -> None:
    capacity = max(row_tokens, *lengths)
    used = sorted(sum(lengths[index] for index in row) for row in pack_rows(lengths, row_tokens))
    assert len(used) < 2 or used[0] + used[1] > capacity


def test_many_short_sequences_make_many_short_rows() -> None:
    """The mask is rows x width x width: it must not grow with the square of the batch."""
    plan = plan_micro_batches([19] * 192, 64, 16384)
    assert len(plan) == 1
    assert max(len(row) for row in plan[0]) == 3


def test_layout_of_a_micro_batch() -> None:
    a, b, c = (trajectory(name, length, seed=length) for name, length in (("a", 5), ("b", 7), ("c", 6)))
    batch = pack([[1, 0], [2]], [a, b, c])
    assert batch.token_ids.shape == (2, 12)
    assert batch.token_ids[0].tolist() == [*b.token_ids.tolist(), *a.token_ids.tolist()]
    assert batch.position_ids[0].tolist() == [*range(7), *range(5)]
    assert batch.segment_ids[0].tolist() == [0] * 7 + [1] * 5
    assert batch.segment_ids[1].tolist() == [0] * 6 + [PADDING_SEGMENT] * 6
    assert batch.target_sequences.tolist() == [1, 1, 1, 1, 0, 0, 2, 2, 2]
    assert batch.target_places.tolist() == [2, 3, 4, 5, 9, 10, 14, 15, 16]
    assert batch.target_token_ids.tolist() == [*b.token_ids[3:], *a.token_ids[3:], *c.token_ids[3:]]
    assert batch.behavior_logprobs.tolist() == [
        *b.behavior_logprobs[3:].tolist(),
        *a.behavior_logprobs[3:].tolist(),
        *c.behavior_logprobs[3:].tolist(),
    ]


def test_targets_follow_the_loss_mask_with_gaps() -> None:
    t = trajectory("a", 8)
    t = replace(t, loss_mask=np.array([0, 0, 1, 1, 0, 0, 1, 0], dtype=np.bool_))
    batch = pack([[0]], [t])
    assert batch.target_places.tolist() == [1, 2, 5]
    assert batch.target_token_ids.tolist() == t.token_ids[[2, 3, 6]].tolist()


def test_routing_stays_with_its_token_and_skips_last_tokens_and_padding() -> None:
    a, b = trajectory("a", 5, seed=1, routing=True), trajectory("b", 8, seed=2, routing=True)
    batch = pack([[0], [1]], [a, b], with_routing=True)
    assert batch.routing is not None
    assert batch.routed is not None
    assert batch.routing.shape == (16, MOE.moe_layers, MOE.experts_per_token)
    assert batch.routed.tolist() == [True] * 4 + [False] * 4 + [True] * 7 + [False]
    assert a.routing is not None
    assert b.routing is not None
    assert (batch.routing[:4] == a.routing).all()
    assert (batch.routing[8:15] == b.routing).all()


def test_mask_is_block_diagonal_and_causal() -> None:
    mask = attention_mask(np.array([[0, 0, 1, PADDING_SEGMENT]], dtype=np.int32))
    assert mask.shape == (1, 1, 4, 4)
    assert mask[0, 0].astype(int).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


def test_temperature_comes_from_the_segment_that_sampled() -> None:
    assert token_temperatures(trajectory("a", 5, prompt=2, temperature=0.5)).tolist() == [1, 1, 0.5, 0.5, 0.5]
