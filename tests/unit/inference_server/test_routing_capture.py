"""A forward's routing is handed out once, whole, in the order of the layers' numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from inference_server.engines.transformers.routing_capture import RoutingCapture
from tests.harness.tiny_models import MOE_FAMILIES, VOCAB_SIZE, make_model


@torch.no_grad()
def feed(model: PreTrainedModel, num_tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model(input_ids=torch.randint(VOCAB_SIZE, (1, num_tokens), generator=generator), use_cache=False)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_a_forward_is_handed_out_once(family: str) -> None:
    model = make_model(0, family=family)
    capture = RoutingCapture(model)
    assert (capture.num_layers, capture.experts_per_token, capture.dtype) == (2, 2, np.dtype(np.uint8))
    feed(model, 5, 0)
    first = capture.take()
    assert first.shape == (5, 2, 2)
    with pytest.raises(RuntimeError, match="2 of 2 MoE layers is missing"):
        capture.take()
    feed(model, 5, 1)
    assert (capture.take() != first).any()


def test_a_layer_that_a_forward_did_not_reach_never_repeats_older_rows() -> None:
    """Stale rows of the layers behind would have the right shape."""
    model = make_model(0)
    capture = RoutingCapture(model)
    feed(model, 5, 0)
    capture.take()
    with torch.no_grad():
        model.model.layers[0].mlp(torch.randn(1, 5, 32))
    with pytest.raises(RuntimeError, match="1 of 2 MoE layers is missing"):
        capture.take()


def test_discarded_rows_do_not_come_back() -> None:
    model = make_model(0)
    capture = RoutingCapture(model)
    feed(model, 5, 0)
    capture.discard()
    with pytest.raises(RuntimeError, match="missing"):
        capture.take()


def test_layers_are_in_the_order_of_their_numbers() -> None:
    """Whatever the order in which modules were registered, and with 10 after 9."""
    model = make_model(0, num_hidden_layers=3, mlp_only_layers=[1])
    first, last = (model.get_submodule(f"model.layers.{layer}.mlp") for layer in (0, 2))
    capture = RoutingCapture(nn.ModuleDict({"10": first, "9": last}))
    hidden = torch.randn(1, 4, 32)
    with torch.no_grad():
        expected = [block.gate(hidden)[2].numpy() for block in (last, first)]  # pyright: ignore[reportCallIssue]
        np.testing.assert_array_equal(capture.take(), np.stack(expected, axis=1))


def test_a_dense_model_has_none() -> None:
    assert RoutingCapture(make_model(0, moe=False)).num_layers == 0
