"""A run fed by foreign backends: in another language, and killed in mid-run. Every label is checked by the oracle."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path

import pytest

from inference_server.engines.remote import RemoteEngine
from leeway import arithmetic, codec
from leeway.arithmetic import ArithmeticWeights
from leeway.cli.main import main
from leeway.cli.serve import serve_command
from leeway.conformance import scheduling
from leeway.rpc import Security
from leeway.service.ports import free_port
from leeway.types import ColumnKind, GroupState, Purpose
from tests.deadlines import WAIT_SECONDS
from tests.e2e.backends import Backend, arithmetic_backend, node_backend, node_command, running
from tests.e2e.rehearsal import EXAMPLE, STEPS, SlowSteps, rehearse
from tests.harness.completions import Completion, request, snapshot
from tests.harness.oracle import Evidence, violations
from tests.harness.recording_proxy import Call, Write

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


NOTICED = 3
"""Deaths of a backend that its worker has to notice."""


def backends_option(*backends: Backend) -> str:
    return f"inference_server.backends={json.dumps([backend.address for backend in backends])}"


def trained_tokens(evidence: Evidence) -> Counter[str]:
    """Trajectories that were trained on, by the server that sampled them."""
    return Counter(
        trajectory.server_id
        for group in evidence.groups
        if group.state is GroupState.CONSUMED and group.purpose is Purpose.TRAIN
        for trajectory in group.trajectories
    )


def engines(evidence: Evidence) -> set[str]:
    """Every engine that a written segment names."""
    return {
        segment.engine
        for group in evidence.groups
        for trajectory in group.trajectories
        for chunk in trajectory.chunks
        for segment in codec.decode_chunk(chunk).segments
        if segment.engine
    }


def test_the_node_backend_keeps_the_contract(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduling, "_MOST_PROBES", 7)  # a slow machine is not called a server that keeps its slots
    arguments = [
        "--samples",
        "128",
        "--quiet-seconds",
        "0.1",
        f"--timeout={WAIT_SECONDS}",
        f"--stop-seconds={WAIT_SECONDS}",
    ]
    code = main(["conformance", *arguments, "--command", f"{node_command()} --max-concurrency 8"])
    output = capsys.readouterr().out
    assert code == 0, output
    assert " 0 FAILED, 0 skipped, 0 not run" in output


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 1.7])
async def test_the_node_backend_samples_by_the_law_to_the_bit(temperature: float) -> None:
    backend = node_backend("--chunk-tokens", "7")
    async with running(backend):
        remote = await RemoteEngine.connect(backend.address, Security(), timeout_seconds=WAIT_SECONDS)
        try:
            await remote.update_weights(snapshot(1, 2))
            generation = request(400, seed=2**64 - 1, temperature=temperature, topk=6, routing=True)
            completion = await Completion(generation).collect(remote)
            assert completion.check_labels() == {2}
        finally:
            await remote.aclose()
    weights = ArithmeticWeights.of(snapshot(1, 2).version)
    prompt = len(generation.prompt_token_ids)
    tokens = [*generation.prompt_token_ids.tolist(), *completion.column(ColumnKind.TOKEN_IDS).tolist()]
    rows = completion.column(ColumnKind.ROUTING).tolist()
    assert rows == [arithmetic.routing_row(weights, at, token) for at, token in enumerate(tokens[:-1])]
    candidates = completion.column(ColumnKind.TOPK_TOKEN_IDS).tolist()
    for at in range(prompt, len(tokens)):
        distribution = arithmetic.next_distribution(weights, at, tokens[at - 1], temperature)
        assert (tokens[at], candidates[at - prompt]) == (
            arithmetic.sample(distribution, at, generation.sampling.seed)[0],
            distribution.top(6),
        )


async def test_the_node_backend_feeds_a_run(tmp_path: Path) -> None:
    flags = ("--max-concurrency", "4", "--chunk-tokens", "4", "--token-milliseconds", "4")
    backends = [node_backend(*flags) for _ in range(2)]
    async with running(*backends):
        options = ("sampling.topk=5", "sampling.routing=true")
        addresses = [backend.address for backend in backends]
        outcome, _, events, evidence = await rehearse(tmp_path, "learner", [], options, backends=addresses)
    assert outcome.error == ""
    assert events == []
    assert violations(evidence) == []
    assert engines(evidence) == {"node-arithmetic/1.0.0"}
    assert set(trained_tokens(evidence)) == {"server-0", "server-1"}
    summary = json.loads((evidence.run_directory / "summary.json").read_text())
    assert summary["finished"]
    assert summary["steps"] == STEPS


async def test_a_worker_that_waits_for_its_backend_stops_when_asked() -> None:
    arguments = ("--config", str(EXAMPLE), "--backend", f"127.0.0.1:{free_port('127.0.0.1')}")
    command = serve_command("inference-server", *arguments)
    worker = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    assert worker.stderr is not None
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            while b"waiting for the backend" not in await worker.stderr.readline():
                pass
            worker.terminate()
            assert await worker.wait() == 0
    finally:
        if worker.returncode is None:
            worker.kill()
            await worker.wait()


async def test_a_run_survives_backends_that_are_killed(tmp_path: Path) -> None:
    options = ("max_concurrency=4", "token_seconds=0.004", "chunk_tokens=4")
    backends = [arithmetic_backend(*options) for _ in range(2)]
    joined = 0  # times that server-0 has joined
    kills = 0
    since: int | None = None  # acknowledged writes of server-0 since it joined, or got work after a kill

    def on_event(event: str, subject: Call | Write) -> None:
        nonlocal joined, kills, since
        server_id = subject.server_id if isinstance(subject, Write) else getattr(subject.request, "server_id", "")
        if server_id != "server-0":
            return
        if event == "JoinRun.ended":
            joined, since = joined + 1, 0
        elif event == "AcquireTickets.ended" and since is None and isinstance(subject, Call) and subject.reply.tickets:
            since = 0  # nothing was in flight in the backend that was killed: there was nothing to notice
        elif event == "write.answered" and since is not None:
            since += 1
            if joined <= NOTICED and since >= 10 * joined and backends[0].running:
                since, kills = None, kills + 1
                backends[0].kill()

    async with running(*backends):
        outcome, _, events, evidence = await rehearse(
            tmp_path,
            "learner",
            [],
            (backends_option(*backends),),
            [on_event],
            network=SlowSteps(lambda: joined > NOTICED),
        )
    assert outcome.error == ""
    assert backends[0].starts == 1 + kills
    # The worker noticed, said why, and was started again; nobody else was disturbed.
    assert [event.partition(";")[0] for event in events] == ["server-0 exited with code 1"] * NOTICED
    log = (evidence.run_directory / "logs" / "server-0.log").read_text()
    assert log.count("server-0: the engine is gone: ") == NOTICED
    assert violations(evidence) == []
    assert any(write.item.attempt > 1 and write.acknowledged for write in evidence.record.writes)
    assert set(trained_tokens(evidence)) == {"server-0", "server-1"}
