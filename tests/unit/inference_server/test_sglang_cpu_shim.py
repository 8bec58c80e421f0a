"""What the shim draws is distributed as it should be, and the seed's alone."""

from __future__ import annotations

import torch

from inference_server.engines.sglang.cpu_shim import draw

ROWS = 20_000


def test_tokens_are_drawn_as_often_as_their_log_probs_say() -> None:
    logprobs = torch.log_softmax(torch.tensor([0.0, 1.0, 2.0, -torch.inf]), -1)
    drawn = draw(logprobs.repeat(ROWS, 1), torch.arange(ROWS), torch.full((ROWS,), 7))
    assert drawn.shape == (ROWS, 1)
    frequency = torch.bincount(drawn[:, 0], minlength=4) / ROWS
    assert (frequency - logprobs.exp()).abs().max() < 0.015  # four standard deviations
    assert frequency[3] == 0


def test_all_bits_of_a_seed_and_the_position_count_and_nothing_else() -> None:
    logprobs = torch.full((64, 50), -torch.tensor(50.0).log().item())
    seeds = torch.arange(64) - 2**63
    drawn = draw(logprobs, seeds, torch.zeros(64, dtype=torch.long))
    assert len(set(drawn[:, 0].tolist())) > 20
    assert (drawn != draw(logprobs, seeds, torch.ones(64, dtype=torch.long))).any()
    assert (drawn[5:6] == draw(logprobs[:1], seeds[5:6], torch.zeros(1, dtype=torch.long))).all()
