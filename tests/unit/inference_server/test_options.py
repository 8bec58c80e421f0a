"""[inference_server] and the process that is put together from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from inference_server.server import InferenceServerProcess, JoinArguments, main
from leeway.config import InferenceServerOptions, load_document, section
from leeway.errors import ConfigError

CONFIG = """
[run]
name = "demo"
steps = 1
groups_per_step = 1
members = 1
max_staleness = 0

[task]
train_file = "tasks.jsonl"
reward = "json:loads"

[sampling]
max_tokens = 4

[inference_server]
engine = "arithmetic"
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(CONFIG, encoding="utf-8")
    return path


def options(path: Path, *overrides: str) -> InferenceServerOptions:
    return section(load_document(path, overrides), "inference_server", InferenceServerOptions)


def test_every_bound_reaches_the_part_that_keeps_it(config: Path) -> None:
    chosen = options(
        config,
        "inference_server.worker.prefetch=7",
        "inference_server.reward.timeout_seconds=1.5",
        "inference_server.writer.window_items=9",
        "inference_server.arithmetic.max_concurrency=3",
    )
    assert chosen.worker.prefetch == 7
    assert chosen.reward.timeout_seconds == 1.5
    assert chosen.writer.window_items == 9
    assert chosen.options_of("arithmetic").max_concurrency == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("inference_server.engine=tgi", "inference_server.engine"),
        ("inference_server.window=9", r"inference_server\.window: unknown key"),
        ("inference_server.reward.concurrency=0", "inference_server.reward.concurrency"),
        ("inference_server.arithmetic.token_seconds=-1", r"inference_server\.arithmetic\.token_seconds"),
        ("inference_server.arithmetic.speed=1", r"arithmetic\.speed: unknown key"),
    ],
)
def test_bad_values_name_file_and_key(config: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        options(config, override)
    assert str(config) in caught.value.message


@pytest.mark.parametrize("index", [-1, 2])
def test_an_index_without_an_address_is_refused(config: Path, index: int) -> None:
    with pytest.raises(ConfigError, match=r"network.inference_servers has 2 entries"):
        InferenceServerProcess(load_document(config), index)


def test_a_backend_samples_where_one_is_named(config: Path) -> None:
    named = 'inference_server.backends=["127.0.0.1:7501", "127.0.0.1:7502"]'
    assert InferenceServerProcess(load_document(config), 1).backend is None
    assert InferenceServerProcess(load_document(config, [named]), 1).backend == "127.0.0.1:7502"
    assert InferenceServerProcess(load_document(config, [named]), 1, "127.0.0.1:9").backend == "127.0.0.1:9"
    one = 'inference_server.backends=["127.0.0.1:7501"]'
    with pytest.raises(ConfigError, match=r"inference_server.backends has 1 entries"):
        InferenceServerProcess(load_document(config, [one]), 1)


def test_a_server_may_join_beside_the_configured_ones(config: Path) -> None:
    joined = InferenceServerProcess(load_document(config), 0, "127.0.0.1:9", JoinArguments("spare"))
    assert (joined.server_id, joined.backend) == ("spare", "127.0.0.1:9")
    assert joined.address.startswith("127.0.0.1:")
    assert joined.metrics_port
    placed = InferenceServerProcess(load_document(config), 0, None, JoinArguments("spare", "127.0.0.1:7", 8))
    assert (placed.address, placed.metrics_port) == ("127.0.0.1:7", 8)
    with pytest.raises(ConfigError, match="server-1 is one of the configured servers"):
        InferenceServerProcess(load_document(config), 0, None, JoinArguments("server-1"))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--check"], 0, ""),
        (["--join", "spare", "--check"], 0, ""),
        (["--join", "", "--check"], 2, "belong to --join NAME"),
        (["--metrics-port", "9", "--check"], 2, "belong to --join NAME"),
        (["--index", "5", "--check"], 2, "none for --index 5"),
        (["--set", "inference_server.nonsense=1"], 2, "unknown key"),
        ([], 2, "tasks.jsonl: cannot read tasks"),
    ],
)
def test_the_process_ends_with_one_line(
    config: Path,
    arguments: list[str],
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["inference_server", "--config", str(config), *arguments])
    assert main() == code
    errors = capsys.readouterr().err
    assert words in errors
    assert len([line for line in errors.splitlines() if line]) == (1 if code else 0)
