"""The process that is put together from a configuration: its place in the run, its arguments, its last line."""

from __future__ import annotations

from pathlib import Path

import pytest

from inference_server.server import InferenceServerProcess, JoinArguments, main
from leeway.config import RunConfiguration, load_configuration
from leeway.errors import ConfigError

EXAMPLE = Path(__file__).parents[3] / "examples" / "rehearsal.toml"


def configuration(*overrides: str) -> RunConfiguration:
    return load_configuration(EXAMPLE, overrides)


@pytest.mark.parametrize("index", [-1, 2])
def test_an_index_without_an_address_is_refused(index: int) -> None:
    with pytest.raises(ConfigError, match=r"network.inference_servers: lists 2"):
        InferenceServerProcess(configuration(), index)


def test_a_backend_samples_where_one_is_named() -> None:
    named = configuration('inference_server.backends=["127.0.0.1:7501", "127.0.0.1:7502"]')
    assert InferenceServerProcess(configuration(), 1).backend is None
    assert InferenceServerProcess(named, 1).backend == "127.0.0.1:7502"
    assert InferenceServerProcess(named, 1, "127.0.0.1:9").backend == "127.0.0.1:9"


def test_a_server_may_join_beside_the_configured_ones() -> None:
    joined = InferenceServerProcess(configuration(), 0, "127.0.0.1:9", JoinArguments("spare"))
    assert (joined.server_id, joined.backend) == ("spare", "127.0.0.1:9")
    assert joined.address.startswith("127.0.0.1:")
    assert joined.metrics_port
    placed = InferenceServerProcess(configuration(), 0, None, JoinArguments("spare", "127.0.0.1:7", 8))
    assert (placed.address, placed.metrics_port) == ("127.0.0.1:7", 8)
    with pytest.raises(ConfigError, match="server-1 is one of the configured servers"):
        InferenceServerProcess(configuration(), 0, None, JoinArguments("server-1"))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--check"], 0, ""),
        (["--join", "spare", "--check"], 0, ""),
        (["--join", "", "--check"], 2, "belong to --join NAME"),
        (["--metrics-port", "9", "--check"], 2, "belong to --join NAME"),
        (["--index", "5", "--check"], 2, "none for --index 5"),
        (["--set", "inference_server.nonsense=1"], 2, "unknown key"),
        (["--set", "evaluation.tasks=99"], 2, "evaluation.tasks"),
    ],
)
def test_the_process_ends_with_one_line(
    arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(EXAMPLE), *arguments]) == code
    errors = capsys.readouterr().err
    assert words in errors
    assert len([line for line in errors.splitlines() if line]) == (1 if code else 0)
