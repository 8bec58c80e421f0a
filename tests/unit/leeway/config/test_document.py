"""How a configuration file is read, overridden, refused key by key, and written again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import annotated_types
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import AfterValidator
from pydantic.fields import FieldInfo

from leeway.config import Document, Options, RunConfiguration, load_configuration, read_configuration
from leeway.config.document import Registered
from leeway.errors import ConfigError

MINIMAL = """
[run]
name = "demo"
steps = 10
groups_per_step = 2
members = 4
max_staleness = 2

[model]
path = "model"

[task]
train_file = "tasks.jsonl"
reward = "json:loads"

[sampling]
max_tokens = 8
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "demo.toml"
    path.write_text(MINIMAL, encoding="utf-8")
    return path


def test_relative_paths_start_at_the_file(config: Path) -> None:
    configuration = load_configuration(config)
    assert configuration.run.run_directory == config.parent / "runs" / "demo"
    assert configuration.replay_buffer.directory == config.parent / "runs" / "demo" / "replay"
    assert configuration.model.path == config.parent / "model"


def test_a_link_to_an_interpreter_is_kept(config: Path) -> None:
    (config.parent / "python").symlink_to("/usr/bin/env")
    options = load_configuration(config, ["inference_server.vllm.python=python"]).inference_server
    assert options.python_of("vllm") == config.parent / "python"
    assert options.python_of("transformers") is None


def test_overrides_are_toml_and_bare_words_are_strings(config: Path) -> None:
    configuration = load_configuration(
        config,
        ["run.steps=7", "run.name=other", 'learner.training.lora.targets=["q_proj"]', "replay_buffer.directory=/log"],
    )
    assert (configuration.run.steps, configuration.run.name) == (7, "other")
    assert configuration.learner.training.lora is not None
    assert configuration.learner.training.lora.targets == ("q_proj",)
    assert configuration.replay_buffer.directory == Path("/log")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.stepz=1", "run.stepz: unknown key"),
        ("learner.training.lora.rang=1", "learner.training.lora.rang: unknown key"),
        ("inference_server.arithmetic.speed=1", "inference_server.arithmetic.speed: unknown key"),
        ("rum.steps=1", "rum: unknown section"),
        ("supervisor.nonsense=1", "supervisor: unknown section"),
        ('run.steps="many"', "run.steps: input should be a valid integer, but is 'many'"),
        ("run.steps=0", "run.steps: input should be greater than or equal to 1, but is 0"),
        ("run.name=a/b", "run.name: string should match pattern"),
        ("inference_server.reward.concurrency=0", "inference_server.reward.concurrency: "),
        ("inference_server.arithmetic.token_seconds=-1", "inference_server.arithmetic.token_seconds: "),
        (
            "inference_server.engine=tgi",
            "inference_server.engine: there is no engine 'tgi'; choose one of transformers",
        ),
        ('inference_server.engines=["tgi"]', "inference_server.engines.0: there is no engine 'tgi'"),
        ("learner.training.algorithm=ppo", "learner.training.algorithm: there is no algorithm 'ppo'"),
        ("network.weights=pigeon", "network.weights: there is no transport 'pigeon'"),
        ("network.policy=learner", "network.policy: string should match pattern"),
        ("steps=1", "--set steps=1: write section.key=value"),
        ("run.steps.more=1", "steps is a value, not a section"),
    ],
)
def test_refusals_name_file_and_key(config: Path, override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_configuration(config, [override])
    assert expected in caught.value.message
    assert "\n" not in caught.value.message
    assert override.startswith(("steps", "run.steps.more")) or caught.value.message.startswith(f"{config}: ")


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["run.drop_no_signal=true", "run.members=1"], "run: drop_no_signal"),
        (["task.tasks=a:b"], "task: "),
        (["network.key=key.pem"], "network: mutual TLS"),
        (["replay_buffer.soft_free_bytes=1"], "replay_buffer: hard_free_bytes"),
        (["learner.ranks=2", "learner.trainer=arithmetic"], "learner: `ranks`"),
        (["learner.training.schedule=cosine"], "learner.training: set `decay_steps`"),
        (["learner.training.overlong_limit=4"], "learner.training: set `overlong_limit`"),
        (["learner.training.horizon=4"], "learner.training: set `horizon`"),
        (["learner.training.algorithm=drpo", "learner.training.delta_low=0"], "learner.training: drpo divides"),
        (['inference_server.vllm.arguments={model="x"}'], "inference_server.vllm.arguments: model"),
    ],
)
def test_rules_within_a_section_name_it(config: Path, overrides: list[str], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_configuration(config, overrides)
    assert caught.value.message.startswith(f"{config}: {key}")


def test_a_missing_key_is_named(config: Path) -> None:
    config.write_text(MINIMAL.replace("[sampling]\nmax_tokens = 8", ""), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"sampling\.max_tokens: required, but not set"):
        load_configuration(config)
    config.write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"run\.name: required, but not set \(and 6 more\)"):
        load_configuration(config)


def test_a_section_is_a_table(config: Path) -> None:
    config.write_text("run = 3", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"run: .* but is 3"):
        load_configuration(config)


@pytest.mark.parametrize("content", ["[run", "\udcff"])
def test_unreadable_files_are_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=r"broken\.toml: not valid TOML"):
        load_configuration(path)
    with pytest.raises(ConfigError, match=r"absent\.toml: cannot read"):
        load_configuration(tmp_path / "absent.toml")


def leaves(model: type[Options], prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], FieldInfo]:
    """Every key that has a value of its own."""
    found: dict[tuple[str, ...], FieldInfo] = {}
    for name, field in model.model_fields.items():
        inner = [part for part in (field.annotation, *get_args(field.annotation)) if isinstance(part, type)]
        section = next((part for part in inner if issubclass(part, Options)), None)
        found |= {(*prefix, name): field} if section is None else leaves(section, (*prefix, name))
    return found


KEYS = leaves(RunConfiguration)
NUMBERS: list[Any] = [float, float | None]
INFINITE = {"truncation", "max_gradient_norm", "slow_ratio"}


@pytest.mark.parametrize("number", ["inf", "nan"])
@pytest.mark.parametrize("key", [".".join(key) for key, field in KEYS.items() if field.annotation in NUMBERS])
def test_waits_and_thresholds_are_finite(config: Path, key: str, number: str) -> None:
    """Every wait has a deadline, whatever a file says; TOML knows infinity."""
    if number == "inf" and key.rpartition(".")[2] in INFINITE:
        load_configuration(config, [f"{key}=inf"])
        return
    with pytest.raises(ConfigError, match=rf"{key}: "):
        load_configuration(config, [f"{key}={number}"])


def values_of(annotation: Any, metadata: list[Any]) -> st.SearchStrategy[Any]:
    """Values that a key may take, and some that it may not."""
    if any(isinstance(m, AfterValidator) and isinstance(m.func, Registered) for m in metadata):
        return st.sampled_from([n for m in metadata if isinstance(m, AfterValidator) for n in m.func.entries])  # type: ignore[attr-defined]
    low: Any = next((m.ge for m in metadata if isinstance(m, annotated_types.Ge)), 0)
    high: Any = next((m.le for m in metadata if isinstance(m, annotated_types.Le)), 1 << 30)
    if get_origin(annotation) is Literal:
        return st.sampled_from(get_args(annotation))
    if annotation is bool:
        return st.booleans()
    if annotation is int:
        return st.integers(low, high) | st.integers(low, low + 8)
    if annotation is float:
        return st.floats(0.125, 1.0) | st.sampled_from((0.0, 1.0, 2.0, 30.0, math.inf))
    if annotation is Path:
        return st.sampled_from(("here", "../there", "/somewhere/else"))
    options = [part for part in get_args(annotation) if part is not type(None)]
    return values_of(options[0], metadata) if type(None) in get_args(annotation) else st.nothing()


SETTABLE = {
    key: strategy
    for key, field in KEYS.items()
    if not (strategy := values_of(field.annotation, field.metadata)).is_empty
}


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_what_is_accepted_is_written_and_read_back_equal(data: st.DataObject, tmp_path_factory: Any) -> None:
    keys = data.draw(st.lists(st.sampled_from(sorted(SETTABLE)), max_size=4, unique=True))
    values: dict[str, Any] = {
        "run": {"name": "demo", "steps": 10, "groups_per_step": 2, "members": 4, "max_staleness": 2},
        "model": {"path": "model"},
        "task": {"train_file": "tasks.jsonl", "reward": "json:loads"},
        "sampling": {"max_tokens": 8},
    }
    for key in keys:
        table = values
        for part in key[:-1]:
            table = table.setdefault(part, {})
        table[key[-1]] = data.draw(SETTABLE[key])
    folder = tmp_path_factory.mktemp("round")
    try:
        configuration = read_configuration(Document(folder / "a.toml", values))
    except ConfigError:
        return
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    configuration.write(elsewhere / "config.toml")
    assert load_configuration(elsewhere / "config.toml").model_dump() == configuration.model_dump()


def test_most_keys_are_tried() -> None:
    assert len(SETTABLE) > 140
    assert len(SETTABLE) > 0.8 * len(KEYS)
