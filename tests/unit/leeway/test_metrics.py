"""The public surface of metrics: every one is documented, with its type, labels and meaning."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from leeway.service.metrics import InferenceServerMetrics, LearnerMetrics, ReplayBufferMetrics

PAGE = Path(__file__).parents[3] / "docs" / "metrics.md"
UNITS = ("_seconds", "_bytes", "_total", "_ratio")


@pytest.mark.parametrize("metrics", [ReplayBufferMetrics, InferenceServerMetrics, LearnerMetrics])
def test_every_metric_is_in_the_table(metrics: type) -> None:
    rows = PAGE.read_text(encoding="utf-8").splitlines()
    for metric in vars(metrics(CollectorRegistry())).values():
        name = metric._name + ("_total" if metric._type == "counter" else "")
        row = f"| `{name}` | {metric._type} | {', '.join(metric._labelnames)} | {metric._documentation} |"
        assert row in rows, f"docs/metrics.md lacks: {row}"


def test_the_table_lists_nothing_else() -> None:
    known = {
        family.name + ("_total" if family.type == "counter" else "")
        for metrics in (ReplayBufferMetrics, InferenceServerMetrics, LearnerMetrics)
        for registry in [CollectorRegistry()]
        for _ in [metrics(registry)]
        for family in registry.collect()
    }
    listed = set(re.findall(r"^\| `(leeway_\w+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    assert listed == known


def test_names_say_their_units() -> None:
    for metrics in (ReplayBufferMetrics, InferenceServerMetrics, LearnerMetrics):
        for metric in vars(metrics(CollectorRegistry())).values():
            assert metric._name.startswith("leeway_")
            if metric._type == "histogram":
                assert metric._name.endswith(UNITS), metric._name
