"""Leeway's own servers keep the contract that they ask of others, whatever engine they have.

What is about their end is looked at when they are of no more use: STOP-1 in `test_stopping`, STOP-2 in `test_pushes`.
"""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from leeway.conformance import kit
from leeway.conformance.client import BackendClient
from leeway.conformance.requirement import Status
from leeway.conformance.session import KitOptions, Session
from leeway.conformance.weights import checkpoint_weights
from leeway.rpc import Security
from tests.engines.engine_server import RUN, EngineServer
from tests.engines.sampled import PATIENCE_SECONDS
from tests.engines.stopping import STOPPING
from tests.harness import tiny_models

OPTIONS = KitOptions(
    run=RUN,
    samples=128,
    long_tokens=128,
    quiet_seconds=0.2,
    call_seconds=PATIENCE_SECONDS,
    check_seconds=PATIENCE_SECONDS,
)


async def test_every_requirement_is_met(server: EngineServer, models: list[PreTrainedModel], tmp_path: Path) -> None:
    weights = checkpoint_weights(tiny_models.save(models[0], tmp_path / "model"))
    await server.info()  # it has started
    client = BackendClient(server.address, Security(), OPTIONS.call_seconds)
    try:
        results = [result async for result in kit.run(Session(client, OPTIONS, weights, Security()))]
    finally:
        await client.aclose()
    assert {result.requirement.id: result.detail for result in results if result.status is Status.FAILED} == {}
    assert {result.requirement.id for result in results if result.status is not Status.PASSED} == STOPPING
