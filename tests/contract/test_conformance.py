"""The conformance kit: servers that keep the contract pass, and each way to break it is named, and nothing else."""

from __future__ import annotations

import shlex
import sys
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import grpc
import pytest

from inference_server.engine import Engine
from inference_server.engines.arithmetic import ArithmeticEngine
from inference_server.served_policy import ServedPolicy
from inference_server.service import SERVICE_NAME, InferenceServicer
from leeway.cli.main import main
from leeway.config import ArithmeticEngineOptions
from leeway.conformance import kit, scheduling
from leeway.conformance.client import BackendClient
from leeway.conformance.kit import exit_code, junit
from leeway.conformance.requirement import Requirement, Result, Status
from leeway.conformance.session import KitOptions, Session
from leeway.conformance.weights import Weights, arithmetic_weights, checkpoint_weights
from leeway.rpc import Security, start_server
from leeway.v1 import inference_pb2_grpc
from tests.contract.broken_servers import BROKEN, Broken
from tests.deadlines import WAIT_SECONDS

# Each test runs the whole kit at least once.
pytestmark = [pytest.mark.timeout(600), pytest.mark.slow, pytest.mark.processes]

OPTIONS = KitOptions(
    samples=128, quiet_seconds=0.1, call_seconds=WAIT_SECONDS, check_seconds=WAIT_SECONDS, stop_seconds=WAIT_SECONDS
)
SEEN_IN_QUIET = {"PAUSE-1", "PAUSE-2", "LIMIT-2"}
"""Who breaks these is seen by what comes, or meets what, while nothing should come: it needs time for that."""
BACKEND = f"{shlex.quote(sys.executable)} -m tests.harness.arithmetic_backend --address {{address}}"
STOPPING = {"STOP-1", "STOP-2"}


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    patient(monkeypatch)


def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow machine is not called a server that keeps its slots: the last of these probes may take two minutes."""
    monkeypatch.setattr(scheduling, "_MOST_PROBES", 7)


@asynccontextmanager
async def served(
    engine: Engine, servicer: type[InferenceServicer] = InferenceServicer, policy: type[ServedPolicy] = ServedPolicy
) -> AsyncGenerator[BackendClient, None]:
    """An engine behind a service, and the kit's client of it."""
    async with AsyncExitStack() as stack:
        stack.push_async_callback(engine.aclose)

        def add(server: grpc.aio.Server) -> None:
            service = servicer(engine, policy(engine, "conformance"))
            inference_pb2_grpc.add_InferenceServiceServicer_to_server(service, server)

        server = await start_server("127.0.0.1:0", add, [SERVICE_NAME], Security())
        stack.push_async_callback(server.stop, 0.0)
        client = BackendClient(f"127.0.0.1:{server.port}", Security(), OPTIONS.call_seconds)
        stack.push_async_callback(client.aclose)
        yield client


async def results_of(client: BackendClient, base: Weights | None = None, options: KitOptions = OPTIONS) -> list[Result]:
    session = Session(client, options, arithmetic_weights() if base is None else base, Security())
    return [result async for result in kit.run(session)]


def failed(results: list[Result]) -> dict[str, str]:
    return {result.requirement.id: result.detail for result in results if result.status is Status.FAILED}


def with_status(results: list[Result], status: Status) -> set[str]:
    return {result.requirement.id for result in results if result.status is status}


async def test_the_arithmetic_server_passes_and_can_be_tested_again() -> None:
    async with served(ArithmeticEngine(ArithmeticEngineOptions(max_concurrency=8))) as client:
        for _ in range(2):
            results = await results_of(client)
            assert failed(results) == {}
            assert with_status(results, Status.PASSED) == {each.id for each in kit.REQUIREMENTS} - STOPPING
            assert with_status(results, Status.SKIPPED) == STOPPING


async def test_late_columns_pass() -> None:
    engine = ArithmeticEngine(ArithmeticEngineOptions(max_concurrency=8, late_columns=True, chunk_tokens=3))
    async with served(engine) as client:
        results = await results_of(client)
        assert failed(results) == {}
        assert with_status(results, Status.NOT_RUN) == set()


@pytest.mark.parametrize("moe", [True, False], ids=["moe", "dense"])
async def test_the_transformers_server_passes(tmp_path: Path, moe: bool) -> None:
    from inference_server.engines.transformers.engine import TransformersEngine
    from leeway.config import TransformersEngineOptions
    from tests.harness.tiny_models import make_model, save

    save(make_model(0, moe=moe), tmp_path)
    engine = TransformersEngine(tmp_path, TransformersEngineOptions(max_concurrency=8, chunk_tokens=4))
    async with served(engine) as client:
        results = await results_of(client, checkpoint_weights(tmp_path))
        assert failed(results) == {}
        assert with_status(results, Status.SKIPPED) == (STOPPING if moe else {*STOPPING, "RECORD-3"})


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: f"{broken.requirement}: {broken.bug}")
async def test_a_broken_server_fails_what_it_breaks_and_nothing_else(
    broken: Broken, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = broken.engine(ArithmeticEngineOptions(max_concurrency=8, **broken.options))
    async with served(engine, broken.servicer, broken.policy) as client:
        options = replace(OPTIONS, quiet_seconds=2.0) if broken.requirement in SEEN_IN_QUIET else OPTIONS
        if broken.requirement == "LIMIT-3":  # is late every time
            monkeypatch.setattr(scheduling, "_MOST_PROBES", 3)
            options = replace(options, probe_seconds=0.25)
        results = await results_of(client, options=options)
        assert set(failed(results)) == {broken.requirement}, failed(results)
        assert exit_code(results) == 1
        # What was not looked at builds on the broken requirement, and is not called passed.
        unmet = {broken.requirement}
        for requirement in kit.REQUIREMENTS:
            if unmet & set(requirement.needs):
                unmet.add(requirement.id)
        assert with_status(results, Status.NOT_RUN) <= unmet


def test_every_requirement_has_a_broken_server_and_a_description() -> None:
    requirements = {requirement.id for requirement in kit.REQUIREMENTS}
    assert {broken.requirement for broken in BROKEN} == requirements - STOPPING
    described = (Path(__file__).parents[2] / "docs" / "conformance.md").read_text(encoding="utf-8")
    assert [name for name in sorted(requirements) if f"| {name} |" not in described] == []


async def test_without_weights_only_what_needs_them_is_skipped() -> None:
    engine = ArithmeticEngine(ArithmeticEngineOptions(max_concurrency=8))
    async with served(engine) as client:
        await results_of(client)  # leaves a version in force
        session = Session(client, OPTIONS, None, Security())
        results = [result async for result in kit.run(session)]
        assert failed(results) == {}
        skipped = with_status(results, Status.SKIPPED)
        assert skipped == {each.id for each in kit.REQUIREMENTS if "UPDATE-1" in (each.id, *each.needs)} | STOPPING


async def test_a_server_without_weights_is_not_called_whole() -> None:
    async with served(ArithmeticEngine(ArithmeticEngineOptions())) as client:
        session = Session(client, OPTIONS, None, Security())
        results = [result async for result in kit.run(session)]
        assert set(failed(results)) == {"INFO-3"}
        assert with_status(results, Status.PASSED) == {"INFO-1", "INFO-2"}


def run_command(tmp_path: Path, command: str, stop_seconds: float = WAIT_SECONDS) -> tuple[int, dict[str, str]]:
    """Exit code, and the outcome of each requirement as the JUnit file has it."""
    path = tmp_path / "junit.xml"
    arguments = ["--samples", "128", "--quiet-seconds", "0.1", f"--timeout={WAIT_SECONDS}"]
    arguments.append(f"--stop-seconds={stop_seconds}")
    code = main(["conformance", *arguments, "--junit", str(path), "--command", command])
    outcomes: dict[str, str] = {}
    for case in ET.parse(path).getroot().iter("testcase"):  # noqa: S314 (our own file)
        found = [child.tag for child in case if child.tag != "system-out"]
        outcomes[case.attrib["name"].partition(" ")[0]] = found[0] if found else "passed"
    return code, outcomes


@pytest.mark.processes
def test_the_command_starts_tests_and_stops_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, outcomes = run_command(tmp_path, f"{BACKEND} --set max_concurrency=8")
    assert code == 0
    assert outcomes == dict.fromkeys((each.id for each in kit.REQUIREMENTS), "passed")
    assert f"{len(kit.REQUIREMENTS)} passed, 0 FAILED, 0 skipped, 0 not run" in capsys.readouterr().out


@pytest.mark.processes
@pytest.mark.parametrize(
    ("flags", "requirement", "stop_seconds"),
    [("--exit-code 3", "STOP-1", WAIT_SECONDS), ("--drain-seconds 600", "STOP-2", 8.0)],
)
def test_a_server_that_does_not_stop_cleanly_fails(
    tmp_path: Path, flags: str, requirement: str, stop_seconds: float
) -> None:
    code, outcomes = run_command(tmp_path, f"{BACKEND} --set max_concurrency=8 {flags}", stop_seconds)
    assert code == 1
    assert {name for name, outcome in outcomes.items() if outcome == "failure"} == {requirement}


@pytest.mark.processes
def test_what_cannot_be_tested_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conformance"]) == 2
    assert "ADDRESS" in capsys.readouterr().err
    assert main(["conformance", "127.0.0.1:1", "--weights", str(tmp_path), "--timeout", "1"]) == 2
    assert "safetensors" in capsys.readouterr().err
    assert main(["conformance", "127.0.0.1:1", "--timeout", "1"]) == 1
    assert "127.0.0.1:1" in capsys.readouterr().err
    assert main(["conformance", "--command", str(tmp_path / "nothing")]) == 2
    assert "cannot be run" in capsys.readouterr().err


def test_junit_is_xml_whatever_a_server_says() -> None:
    async def check(session: Session) -> str:
        return ""

    requirement = Requirement("INFO-1", "<says> & \x00", check)
    document = junit([Result(requirement, Status.FAILED, "\x1b[31m\x00<&>\ud800", 0.0)], "leeway")
    case = next(ET.fromstring(document).iter("testcase"))  # noqa: S314 (our own)
    assert case[0].tag == "failure"
    assert case[0].attrib["message"].endswith("<&> ")
