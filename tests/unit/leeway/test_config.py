from pathlib import Path

import pytest

from leeway.config import (
    InferenceServerOptions,
    LearnerOptions,
    NetworkOptions,
    Options,
    ReplayBufferOptions,
    RunOptions,
    SamplingOptions,
    load_document,
    section,
    write_document,
)
from leeway.errors import ConfigError

RUN = """
[run]
name = "demo"
steps = 10
groups_per_step = 2
members = 4
max_staleness = 2
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "demo.toml"
    path.write_text(RUN, encoding="utf-8")
    return path


def test_relative_paths_start_at_the_file(config: Path) -> None:
    run = section(load_document(config), "run", RunOptions)
    assert run.run_directory == config.parent / "runs" / "demo"


def test_overrides_are_toml_and_bare_words_are_strings(config: Path) -> None:
    run = section(load_document(config, ["run.steps=7", "run.name=other"]), "run", RunOptions)
    assert (run.steps, run.name) == (7, "other")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.stepz=1", "run.stepz: unknown key"),
        ('run.steps="many"', "run.steps: input should be a valid integer, but is 'many'"),
        ("run.steps=0", "run.steps: input should be greater than or equal to 1, but is 0"),
        ("run.name=a/b", "run.name: string should match pattern"),
        ("steps=1", "--set steps=1: write section.key=value"),
        ("run.steps.more=1", "steps is a value, not a section"),
        ("rum.steps=1", "unknown section [rum]"),
    ],
)
def test_refusals_name_file_and_key(config: Path, override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        section(load_document(config, [override]), "run", RunOptions)
    assert expected in caught.value.message
    assert "\n" not in caught.value.message
    assert override.startswith(("steps", "run.steps.more")) or str(config) in caught.value.message


@pytest.mark.parametrize("number", ["inf", "nan"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("learner.draw_timeout_seconds", LearnerOptions),
        ("learner.training.delta_low", LearnerOptions),
        ("inference_server.writer.patience_seconds", InferenceServerOptions),
        ("replay_buffer.retain_seconds", ReplayBufferOptions),
    ],
)
def test_waits_and_thresholds_are_finite(config: Path, name: str, options: type[Options], number: str) -> None:
    """Every wait has a deadline, whatever a file says; TOML knows infinity."""
    overrides = [f"{name}={number}", "replay_buffer.directory=x"]
    with pytest.raises(ConfigError, match=rf"{name}: "):
        section(load_document(config, overrides), name.partition(".")[0], options)


def test_a_missing_key_is_named(config: Path) -> None:
    with pytest.raises(ConfigError, match=r"sampling\.max_tokens: required, but not set"):
        section(load_document(config), "sampling", SamplingOptions)


@pytest.mark.parametrize("content", ["[run", "\udcff"])
def test_unreadable_files_are_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=r"broken\.toml: not valid TOML"):
        load_document(path)
    with pytest.raises(ConfigError, match=r"absent\.toml: cannot read"):
        load_document(tmp_path / "absent.toml")


def test_a_saved_document_reads_back_equal(config: Path, tmp_path: Path) -> None:
    document = load_document(config)
    sections = {"run": section(document, "run", RunOptions), "network": NetworkOptions()}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    write_document(elsewhere / "config.toml", sections)
    again = load_document(elsewhere / "config.toml")
    assert section(again, "run", RunOptions) == sections["run"]
    assert section(again, "network", NetworkOptions) == sections["network"]


def test_a_filter_of_groups_without_signal_needs_members(config: Path) -> None:
    with pytest.raises(ConfigError, match="drop_no_signal needs at least 2 members"):
        section(load_document(config, ["run.drop_no_signal=true", "run.members=1"]), "run", RunOptions)
    assert section(load_document(config, ["run.drop_no_signal=true"]), "run", RunOptions).drop_no_signal
