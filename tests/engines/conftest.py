"""One server per engine and kind of model for the whole session: an engine takes a minute to start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from tests.engines.engine_server import EngineServer, EnvironmentMissingError, engine_server
from tests.harness import tiny_models

ENGINES = ("transformers", "vllm", "sglang")
VOCAB_SIZE = 256
CONTEXT_LENGTH = 2048
# A head size and an expert size that every engine has kernels for.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "head_dim": 32,
    "intermediate_size": 96,
    "max_position_embeddings": CONTEXT_LENGTH,
    "initializer_range": 0.1,
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """These tests take minutes and environments of their own: they run when they are asked for by their marker."""
    asked_for = "engines" in str(config.getoption("markexpr"))
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.engines)
            item.add_marker(pytest.mark.timeout(1200))  # beyond every deadline of a single step
            if not asked_for:
                item.add_marker(pytest.mark.skip(reason="run by `make test-engines`"))


def make_model(seed: int, *, moe: bool = True) -> PreTrainedModel:
    sizes: dict[str, Any] = _SIZES | ({"moe_intermediate_size": 64} if moe else {})
    return tiny_models.make_model(seed, moe=moe, **sizes)


@pytest.fixture(scope="session")
def models() -> list[PreTrainedModel]:
    """Mixtures of experts that disagree grossly; the step of a snapshot is its place here."""
    return [make_model(seed) for seed in range(4)]


@pytest.fixture(scope="session", params=ENGINES)
def server(
    request: pytest.FixtureRequest, models: list[PreTrainedModel], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineServer]:
    directory = tmp_path_factory.mktemp(request.param)
    yield from _serve(request.param, tiny_models.save(models[0], directory / "model"), directory)


@pytest.fixture(params=[engine for engine in ENGINES if engine != "transformers"])
def recomputing_server(
    request: pytest.FixtureRequest, models: list[PreTrainedModel], tmp_path: Path
) -> Iterator[EngineServer]:
    """A server that computes running sequences again when weights change."""
    model = tiny_models.save(models[0], tmp_path / "model")
    yield from _serve(request.param, model, tmp_path, kv_on_update="recompute")


def _serve(engine: str, model: Path, directory: Path, **options: Any) -> Iterator[EngineServer]:
    try:
        with engine_server(engine, model, directory, **options) as server:
            yield server
    except EnvironmentMissingError as missing:
        pytest.skip(str(missing))
