"""The last that each engine's server is used for: it stops cleanly. One with a sequence in flight: `test_pushes`."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from tests.engines.engine_server import EngineServer
from tests.engines.stopping import assert_stops
from tests.harness import tiny_models


async def test_a_server_stops_cleanly(server: EngineServer, models: list[PreTrainedModel], tmp_path: Path) -> None:
    await server.info()  # it has started
    await assert_stops(server, tiny_models.save(models[0], tmp_path / "model"), "STOP-1")
