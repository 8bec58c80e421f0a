"""The quickstart, shortened: real processes, the real model, a real Prometheus beside it, and what it leaves behind."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from learner.run_artifacts.journal import read_journal
from leeway.huggingface import published_tensors, tensor_bytes
from leeway.service.metrics import InferenceServerMetrics, LearnerMetrics, ReplayBufferMetrics
from leeway.service.ports import free_port
from leeway.types import WeightManifest
from leeway.weights.digests import tensor_entry, weights_digest
from tests.deadlines import RUN_SECONDS
from tests.e2e.prometheus import running_prometheus, wait_until
from tests.harness.processes import CLI, ROOT, leeway, module, overriding

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

STEPS = 30


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """A run that ended, and what Prometheus saw of it."""

    directory: Path
    stdout: str
    metric_names: set[str]

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.directory / "summary.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    folder = tmp_path_factory.mktemp("quickstart")
    ports = [free_port("127.0.0.1") for _ in range(4)]
    overrides = [
        f"run.directory={folder}",
        f"run.steps={STEPS}",
        "run.max_staleness=2",
        "learner.checkpoint_every_steps=10",
        "network.replay_buffer=127.0.0.1:0",
        "network.policy=127.0.0.1:0",
        'network.inference_servers=["127.0.0.1:0", "127.0.0.1:0"]',
        f"metrics.replay_buffer={ports[0]}",
        f"metrics.learner={ports[1]}",
        f"metrics.inference_servers={ports[2:]}",
    ]
    command = module(CLI, "run", "examples/sortmix8.toml", "--plain", *overriding(overrides))
    targets = {"replay_buffer": ports[:1], "learner": ports[1:2], "inference_server": ports[2:]}
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        with running_prometheus(folder, targets) as prometheus:
            wait_until(
                lambda: bool(prometheus.query("leeway_learner_step >= 5")) and len(prometheus.query("up == 1")) == 4,
                "Prometheus sees the learner train, and all four services",
                seconds=RUN_SECONDS,
            )
            metric_names = prometheus.metric_names()
            stdout, stderr = process.communicate(timeout=RUN_SECONDS)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, stderr
    return FinishedRun(folder / "sortmix8", stdout, metric_names)


def test_it_learns_from_stale_data(run: FinishedRun) -> None:
    summary = run.summary
    assert summary["finished"]
    assert summary["steps"] == STEPS
    assert summary["heldout_draws"] >= 2000
    assert summary["heldout_before"] < 0.2
    assert summary["heldout_after"] > summary["heldout_before"] + 0.2
    assert max(int(staleness) for staleness in summary["staleness_histogram"]) <= 2
    assert summary["stale_token_fraction"] >= 0.5
    assert summary["overlap_seconds"] > 0
    assert 0 <= summary["learner_idle_fraction"] < 1
    assert summary["weight_push_seconds"]["median"] > 0
    assert summary["groups_issued"] == summary["groups_consumed"] + sum(summary["dropped_groups"].values())


def test_the_report_stands_alone(run: FinishedRun) -> None:
    page = (run.directory / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 4
    assert not re.findall(r'(?:src|href)="(?!#)[^"]*"', page)
    assert f"{run.summary['heldout_after']:.3f}" in page
    assert str(run.directory / "report.html") in run.stdout


def test_prometheus_sees_every_metric_of_every_service(run: FinishedRun) -> None:
    from prometheus_client import CollectorRegistry

    labelled_by_events = {  # series that only appear with their first event
        "leeway_learner_heldout_reward",
        "leeway_learner_tag_reward",
        "leeway_replay_dropped_groups",
        "leeway_replay_drained_servers",
    }
    missing: list[str] = []
    for metrics in (ReplayBufferMetrics, InferenceServerMetrics, LearnerMetrics):
        registry = CollectorRegistry()
        metrics(registry)
        for family in registry.collect():
            suffix = {"counter": "_total", "histogram": "_count"}.get(family.type, "")
            name = family.name + suffix
            if name not in run.metric_names and family.name not in labelled_by_events:
                missing.append(name)
    assert not missing


def test_rollouts_show_what_was_said_and_where_pi_and_mu_part(run: FinishedRun) -> None:
    shown = leeway("rollouts", str(run.directory), "--step", str(STEPS), "--groups", "1")
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"group \S+, task \d+, step 30, consumed", shown.stdout)
    assert re.search(r"reward [01]  stop  version 1\.\d+", shown.stdout)
    assert re.search(r"prompt +'[a-z]{8}>'", shown.stdout)
    assert re.search(r"pi - mu( +[+-]0\.\d{3})+", shown.stdout)


def test_an_exported_checkpoint_is_what_was_published(run: FinishedRun) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    missing = leeway("export", str(run.directory), "7")
    assert missing.returncode == 1
    assert "no checkpoint of step 7; there are: 20, 30" in missing.stderr
    exported = leeway("export", str(run.directory), "30")
    assert exported.returncode == 0, exported.stderr
    directory = run.directory / "export" / "step-30"
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    entries = [
        tensor_entry(name, "bfloat16", tuple(tensor.shape), tensor_bytes(tensor))
        for name, tensor in published_tensors(model, "bfloat16")
    ]
    digest = weights_digest(WeightManifest(tuple(entries))).hex()
    assert read_journal(run.directory / "metrics.jsonl")[-1]["version"].endswith(f"@{digest[:8]}")
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    answer = model.generate(**tokenizer("hgfedcba>", return_tensors="pt"), max_new_tokens=9, do_sample=False)[0, 9:]
    assert re.fullmatch("[a-z]{8}(<eos>)?.*", tokenizer.decode(answer))


def test_a_finished_run_is_not_overwritten(run: FinishedRun) -> None:
    again = leeway("run", "examples/sortmix8.toml", "--set", f"run.directory={run.directory.parent}")
    assert again.returncode == 2
    assert "this run is finished" in again.stderr
