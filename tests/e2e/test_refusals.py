"""What `leeway run` refuses: one line that names the file, key or address, exit code 2, and nothing left in the way."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from leeway.cli.main import main
from tests.deadlines import RUN_SECONDS, WAIT_SECONDS
from tests.e2e.rehearsal import EXAMPLE, AllAsk, rehearse

pytestmark = pytest.mark.e2e

CERTIFICATES = ("network.certificate=a.pem", "network.key=a.key", "network.authority=ca.pem")
SORTMIX8 = Path(__file__).parents[2] / "examples" / "sortmix8.toml"


def refused(capsys: pytest.CaptureFixture[str], config: Path, directory: Path, *overrides: str) -> str:
    """Run, expect a refusal, return what it said."""
    arguments = ["run", str(config), "--plain", "--set", f"run.directory={directory}"]
    for override in overrides:
        arguments += ["--set", override]
    assert main(arguments) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("learner.lr=1e-3", "learner.lr: unknown key"),
        ("lerner.seed=1", "lerner: unknown section"),
        ('run.steps="many"', "run.steps: input should be a valid integer, but is 'many'"),
        ("learner.training.algorithm=ppo2", "learner.training.algorithm: there is no algorithm 'ppo2'"),
        ("model.path=/nonexistent", "model.path: /nonexistent"),
        ("task.reward=sortmix8.task:missing", "sortmix8.task has no function missing"),
        ("task.reward=sortmix9:reward", "cannot import sortmix9"),
        ("evaluation.tasks=100000", "evaluation.tasks: is 100000, but there are 256 held-out tasks"),
        ("evaluation.members=500", "evaluation.members: is 500, but a server takes at most"),
        ("metrics.inference_servers=[9403]", "metrics.inference_servers: lists 1"),
        ('inference_server.backends=["a:1"]', "inference_server.backends: lists 1"),
        ("learner.trainer=arithmetic", "a rehearsal needs arithmetic for both"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, expected: str
) -> None:
    said = refused(capsys, SORTMIX8, tmp_path / "runs", override)
    assert said.count("\n") == 1
    assert said.startswith(f"leeway: {SORTMIX8}: ")
    assert expected in said
    assert not (tmp_path / "runs").exists()


def test_broadcasts_beyond_this_host_need_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    beyond = ("network.weights=collective", "network.policy=learner.example:7402", *CERTIFICATES)
    assert "network.weights: " in refused(capsys, EXAMPLE, tmp_path / "runs", *beyond)
    assert not (tmp_path / "runs").exists()


@pytest.mark.timeout(RUN_SECONDS)
async def test_a_run_whose_weights_are_broadcast_comes_to_its_end(tmp_path: Path) -> None:
    both = AllAsk({"server-0", "server-1"})  # what is published then goes to both
    overrides = ("run.steps=12", "network.weights=collective", f"learner.draw_timeout_seconds={2 * WAIT_SECONDS}")
    outcome, _, _, _ = await rehearse(tmp_path, "nobody", [], overrides, [both.on_event], network=both)
    assert outcome.error == ""
    logs = {file.stem: file.read_text(encoding="utf-8") for file in (tmp_path / "rehearsal" / "logs").iterdir()}
    assert "a group of 3 for broadcasts: the learner and server-0, server-1" in logs["learner"]
    assert not [name for name, text in logs.items() if "broadcast" in text and "fails" in text]


def test_a_port_in_use_is_named_and_the_next_start_is_free(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        said = refused(capsys, EXAMPLE, tmp_path, f"network.replay_buffer={address}")
    assert f"cannot listen on {address}: is the port in use?" in said
    arguments = ["run", str(EXAMPLE), "--plain", "--set", f"run.directory={tmp_path}", "--set", "run.steps=2"]
    assert main(arguments) == 0


def test_listening_beyond_loopback_without_certificates_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, EXAMPLE, tmp_path, "network.replay_buffer=0.0.0.0:0")
    assert "network.replay_buffer: 0.0.0.0:0 " in said
    assert "network.certificate" in said
