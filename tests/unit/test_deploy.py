"""The files of deploy/ agree with each other and with the configuration that they mount."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from leeway.config import MetricsOptions, NetworkOptions, load_configuration

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SERVICES = ("replay-buffer", "inference-server-0", "inference-server-1", "learner")


def compose() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))


def options() -> tuple[NetworkOptions, MetricsOptions]:
    """What the containers read: the mounted file with the overrides of their command line."""
    arguments: list[str] = compose()["services"]["learner"]["command"]
    (config,) = [argument.removeprefix("--config=/") for argument in arguments if argument.startswith("--config=/")]
    overrides = [argument.removeprefix("--set=") for argument in arguments if argument.startswith("--set=")]
    assert len(overrides) == len(arguments) - 1
    configuration = load_configuration(ROOT / config, overrides)
    assert configuration.run.directory == Path("/var/lib/leeway")
    return configuration.network, configuration.metrics


def grpc_addresses() -> dict[str, str]:
    network, _ = options()
    inference_servers = {
        f"inference-server-{index}": address for index, address in enumerate(network.inference_servers)
    }
    return {"replay-buffer": network.replay_buffer, "learner": network.policy, **inference_servers}


def metrics_addresses() -> dict[str, str]:
    _, metrics = options()
    ports = {
        "replay-buffer": metrics.replay_buffer,
        "learner": metrics.learner,
        **{f"inference-server-{index}": port for index, port in enumerate(metrics.inference_servers)},
    }
    return {service: f"{service}:{port}" for service, port in ports.items()}


def test_every_service_of_the_topology_has_a_container() -> None:
    services = compose()["services"]
    assert set(services) - {"prometheus"} == set(SERVICES)
    assert {services[name]["hostname"] for name in SERVICES} == set(SERVICES)


def test_every_service_listens_under_its_own_name() -> None:
    addresses = grpc_addresses()
    assert {name: address.rpartition(":")[0] for name, address in addresses.items()} == {
        name: name for name in SERVICES
    }


def test_prometheus_scrapes_every_service_once() -> None:
    configuration = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))
    targets = [
        target
        for job in configuration["scrape_configs"]
        for static in job["static_configs"]
        for target in static["targets"]
    ]
    assert sorted(targets) == sorted(metrics_addresses().values())


@pytest.mark.parametrize("service", SERVICES)
def test_the_image_checks_and_exposes_the_ports_of_its_service(service: str) -> None:
    dockerfile = (ROOT / compose()["services"][service]["build"]["dockerfile"]).read_text(encoding="utf-8")
    port = grpc_addresses()[service].rpartition(":")[2]
    metrics_port = metrics_addresses()[service].rpartition(":")[2]
    assert re.search(rf"^EXPOSE {port} {metrics_port}$", dockerfile, re.MULTILINE)
    assert f"health $(hostname):{port}" in dockerfile


def test_plain_text_stays_on_a_network_without_a_way_out() -> None:
    network, _ = options()
    configuration = compose()
    assert network.insecure
    for service in SERVICES:
        assert configuration["services"][service]["networks"] == ["private"]
        assert "ports" not in configuration["services"][service]
    assert configuration["networks"]["private"] == {"internal": True}
