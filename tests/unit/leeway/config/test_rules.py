"""`leeway run --check` and every service's `--check` refuse a configuration with one and the same line."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from leeway.cli.main import main as leeway
from leeway.config import load_configuration
from leeway.config.rules import RULES
from leeway.service.process import EXIT_OK, EXIT_REFUSED

EXAMPLES = Path(__file__).parents[4] / "examples"
EXAMPLE = EXAMPLES / "sortmix8.toml"

REFUSED: dict[str, list[tuple[str, ...]]] = {
    "list_one_entry_per_server": [
        ("metrics.inference_servers=[0]", "metrics.inference_servers: lists 1, but network.inference_servers lists 2"),
        ('inference_server.backends=["127.0.0.1:7501"]', "inference_server.backends: lists 1"),
        ('inference_server.engines=["vllm", "vllm", "vllm"]', "inference_server.engines: lists 3"),
    ],
    "rehearse_on_both_sides": [
        ("inference_server.engine=arithmetic", "inference_server.engine is arithmetic, but learner.trainer is torch"),
        ("learner.trainer=arithmetic", "inference_server.engine is transformers, but learner.trainer is arithmetic"),
        ('inference_server.engines=["transformers", "arithmetic"]', "inference_server.engine is arithmetic"),
    ],
    "train_a_model": [],  # below: no override unsets a key
    "listen_beyond_loopback_only_with_trust": [
        ("network.replay_buffer=0.0.0.0:7401", "network.replay_buffer: 0.0.0.0:7401 is beyond loopback"),
        ("network.policy=learner:7402", "network.policy: learner:7402"),
        ('network.inference_servers=["127.0.0.1:1", "gpu-1:2"]', "network.inference_servers: gpu-1:2"),
    ],
    "broadcast_where_peers_meet_in_private": [
        ("network.weights=collective", "network.insecure=true", "network.policy=0.0.0.0:7402", "network.policy: "),
        (
            "network.weights=collective",
            *("network.certificate=a", "network.key=b", "network.authority=c", "network.policy=learner:7402"),
            'network.weights: "collective" would send weights beyond this host unencrypted',
        ),
    ],
    "give_every_rank_a_group": [
        ("learner.ranks=100", "learner.ranks: is 100, but run.groups_per_step is 24"),
        ("learner.ranks=25", "learner.ranks: is 25"),
    ],
    "publish_often_enough": [
        ("learner.publish_every=10", "learner.publish_every: is 10; beyond run.max_staleness + 1 = 3"),
        ("learner.publish_every=4", "learner.publish_every: is 4"),
    ],
    "judge_signal_by_final_rewards": [
        (
            *("run.drop_no_signal=true", "learner.training.overlong_limit=8", "learner.training.overlong_cache=4"),
            "run.drop_no_signal: ",
        )
    ],
    "record_what_the_loss_reads": [
        ("learner.training.algorithm=dppo-topk-tv", "learner.training.algorithm: dppo-topk-tv needs the top 20"),
        ("sampling.topk=4", "learner.training.algorithm=predictive-mask", "learner.training.algorithm: "),
        ("learner.training.algorithm=trm", "learner.training.divergence=topk-kl", "learner.training.algorithm: "),
    ],
    "record_the_routing_that_is_replayed": [("sampling.routing=false", "learner.training.routing_replay: ")],
    "record_no_more_than_the_engine_can": [
        ("sampling.topk=5", "inference_server.transformers.max_topk=4", "sampling.topk: is 5, but inference_server"),
    ],
    "evaluate_groups_that_fit_a_server": [
        ("evaluation.members=113", "evaluation.members: is 113, but a server takes at most 112"),
        (
            *("inference_server.worker.prefetch=0", "inference_server.transformers.max_concurrency=4"),
            "evaluation.members: is 8, but a server takes at most 4",
        ),
    ],
}
ACCEPTED: list[tuple[str, ...]] = [
    (),
    ("learner.ranks=24",),
    ("learner.publish_every=3",),
    ("sampling.topk=2", "learner.training.algorithm=dppo-topk-tv", "learner.training.topk=2"),
    ("sampling.routing=false", "learner.training.routing_replay=false"),
    ('inference_server.backends=["gpu-1:1", "gpu-2:1"]', 'network.inference_servers=["gpu-1:2", "gpu-2:2"]'),
    ("network.insecure=true", "network.policy=learner:7402", "network.weights=collective"),
    ("evaluation.members=112",),
    ("evaluation.members=999", "evaluation.tasks=0"),
]

Check = Callable[[Path, Sequence[str]], tuple[int, str]]


@pytest.fixture
def checks(capsys: pytest.CaptureFixture[str]) -> dict[str, Check]:
    """Every program that reads a configuration: its exit code and what it says, without the program's name."""

    def check_by(*command: str) -> Check:
        def check(config: Path, overrides: Sequence[str]) -> tuple[int, str]:
            options = [part for override in overrides for part in ("--set", override)]
            code = leeway([*command, str(config), "--check", *options])
            return code, capsys.readouterr().err.partition(": ")[2]

        return check

    return {
        "run": check_by("run"),
        **{name: check_by("serve", name, "--config") for name in ("replay-buffer", "learner", "inference-server")},
    }


def everywhere(checks: dict[str, Check], config: Path, overrides: Sequence[str]) -> str:
    """What all programs say when they refuse."""
    said = {name: check(config, overrides) for name, check in checks.items()}
    assert {code for code, _ in said.values()} == {EXIT_REFUSED}, said
    (line,) = {line for _, line in said.values()}
    assert line.count("\n") == 1
    return line


@pytest.mark.parametrize(("rule", "case"), [(rule, case) for rule, cases in REFUSED.items() for case in cases])
def test_every_program_refuses_with_the_same_line(checks: dict[str, Check], rule: str, case: tuple[str, ...]) -> None:
    *overrides, expected = case
    assert everywhere(checks, EXAMPLE, overrides).startswith(f"{EXAMPLE}: {expected}")


def test_a_model_is_needed_by_whatever_is_no_rehearsal(checks: dict[str, Check], tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(EXAMPLE.read_text(encoding="utf-8").replace('path = "sortmix8/model-moe"', ""), encoding="utf-8")
    assert everywhere(checks, config, ()).startswith(f"{config}: model.path: required, but not set")


@pytest.mark.parametrize("override", ["run.stepz=1", "supervisor.nonsense=1", "run.steps=0"])
def test_every_program_refuses_unknown_and_bad_keys(checks: dict[str, Check], override: str) -> None:
    assert everywhere(checks, EXAMPLE, [override]).startswith(
        f"{EXAMPLE}: {override.partition('=')[0].partition('.')[0]}"
    )


def test_every_rule_has_a_case() -> None:
    assert [rule.__name__ for rule in RULES] == list(REFUSED)


@pytest.mark.parametrize("overrides", ACCEPTED, ids=lambda overrides: " ".join(overrides) or "as it is")
def test_what_no_rule_forbids_is_accepted(overrides: tuple[str, ...]) -> None:
    load_configuration(EXAMPLE, overrides)


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_program_accepts_the_examples(checks: dict[str, Check], example: Path) -> None:
    assert {name: check(example, ())[0] for name, check in checks.items()} == dict.fromkeys(checks, EXIT_OK)


OPENED: list[tuple[str, str, set[str]]] = [
    ("model.path=elsewhere", "model.path: ", {"run", "learner", "inference-server"}),
    ("evaluation.tasks=257", "evaluation.tasks: is 257", {"run", "learner", "inference-server"}),
    ("task.tasks=sortmix8.task:nothing", "sortmix8.task:nothing: ", {"run", "learner", "inference-server"}),
    ("task.reward=sortmix8.task:nothing", "sortmix8.task:nothing: ", {"run", "inference-server"}),
    ("network.weights=collective", "network.weights: ", {"run", "learner", "inference-server"}),
    (
        'inference_server.engines=["transformers", "vllm"]',
        "inference_server.vllm.python: there is no interpreter",
        {"run"},
    ),
]


@pytest.mark.parametrize(("override", "expected", "programs"), OPENED, ids=[case[0] for case in OPENED])
def test_who_needs_what_is_named_refuses_with_the_same_line(
    checks: dict[str, Check], override: str, expected: str, programs: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay buffer opens none of it: it may run on a machine that has none of it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    said = {name: check(EXAMPLE, [override, "inference_server.vllm.python=/nowhere"]) for name, check in checks.items()}
    assert {name for name, (code, _) in said.items() if code == EXIT_REFUSED} == programs, said
    (line,) = {line for name, (_, line) in said.items() if name in programs}
    assert line.startswith(f"{EXAMPLE}: {expected}")


def test_an_engine_that_is_not_installed_is_named_by_its_server(checks: dict[str, Check]) -> None:
    code, line = checks["inference-server"](EXAMPLE, ["inference_server.engine=vllm"])
    assert (code, line.startswith(f"{EXAMPLE}: inference_server.engine: ")) == (EXIT_REFUSED, True)
    assert "inference_server.vllm.python" in line
