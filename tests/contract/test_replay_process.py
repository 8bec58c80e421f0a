"""`python -m replay_buffer` as a process: how it refuses to start, and how it ends."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from leeway.rpc import check_health
from leeway.service.ports import free_port
from leeway.types import TrajectoryFailure, WriteItem
from replay_buffer.storage.index_file import FILE
from replay_buffer.storage.log import Log, LogOptions
from replay_buffer.storage.segments import segment_path
from tests.deadlines import WAIT_SECONDS
from tests.harness.buffer_server import PLAIN, connected, write
from tests.harness.configurations import write_rehearsal
from tests.harness.replay_builders import ROOT, filled, spec, version

pytestmark = pytest.mark.processes


async def start(directory: Path, *arguments: str) -> asyncio.subprocess.Process:
    config = write_rehearsal(directory / "run.toml", f"replay_buffer.directory={directory / 'log'}")
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "replay_buffer", "--config", str(config), *arguments),
        stderr=asyncio.subprocess.PIPE,
    )


async def ended(process: asyncio.subprocess.Process) -> tuple[int | None, list[str]]:
    async with asyncio.timeout(WAIT_SECONDS):
        _, stderr = await process.communicate()
    return process.returncode, [line for line in stderr.decode().splitlines() if line.startswith("replay_buffer: ")]


@pytest.fixture
def ports() -> tuple[int, list[str]]:
    port = free_port("127.0.0.1")
    metrics_port = free_port("127.0.0.1")
    return port, [f"--set=network.replay_buffer=127.0.0.1:{port}", f"--set=metrics.replay_buffer={metrics_port}"]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
async def test_it_serves_until_it_is_told_to_stop(
    tmp_path: Path, ports: tuple[int, list[str]], how: signal.Signals
) -> None:
    port, arguments = ports
    process = await start(tmp_path, *arguments)
    await check_health(f"127.0.0.1:{port}", PLAIN, WAIT_SECONDS)
    async with connected(f"127.0.0.1:{port}") as client:
        await client.open_run(spec(), ROOT, [])
        waiting = asyncio.create_task(client.acquire_tickets("s0", ROOT, 1, WAIT_SECONDS))
        process.send_signal(how)
        assert await ended(process) == (0, [])
        waiting.cancel()


async def test_its_metrics_can_be_scraped(tmp_path: Path, ports: tuple[int, list[str]]) -> None:
    port, arguments = ports
    process = await start(tmp_path, *arguments)
    await check_health(f"127.0.0.1:{port}", PLAIN, WAIT_SECONDS)
    async with connected(f"127.0.0.1:{port}") as client:
        await client.open_run(spec(groups_per_step=1, max_staleness=1, max_attempts=1), ROOT, [])
        (whole, poison), *_ = await client.acquire_tickets("s0", ROOT, 4, WAIT_SECONDS)
        await write(client, filled(whole))
        failure = TrajectoryFailure("the engine died", retryable=True)
        await write(client, [WriteItem(member.trajectory_id, 1, 0, failure) for member in poison.members])
        await client.draw_batch(1, 1, WAIT_SECONDS)
        await client.advance(1, version(1), ROOT)
        await client.commit(1, 1)
    metrics_port = arguments[1].rpartition("=")[2]
    page = await asyncio.to_thread(_scrape, f"http://127.0.0.1:{metrics_port}/metrics")
    values = {
        (sample.name, *sorted(set(sample.labels.values()) - {ROOT.run})): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }
    expected = {
        ("leeway_replay_groups", "consumed"): 1,
        ("leeway_replay_groups", "dropped"): 1,
        ("leeway_replay_groups", "open"): 0,
        ("leeway_replay_dropped_groups", "dead_letter"): 1,
        ("leeway_replay_dropped_groups", "stale"): 0,
        ("leeway_replay_ended_groups_total", "consumed"): 1,
        ("leeway_replay_ended_groups_total", "dead_letter"): 1,
        ("leeway_replay_dead_letters",): 1,
        ("leeway_replay_leases",): 0,
        ("leeway_replay_head_step",): 1,
        ("leeway_replay_committed_step",): 1,
        ("leeway_replay_epoch",): 1,
        ("leeway_replay_issued_tickets_total", "s0", "train"): 2,
        ("leeway_replay_reissued_tickets_total", "train"): 0,
        ("leeway_replay_closed_trajectories_total", "s0"): 2,
        ("leeway_replay_written_items_total", "acknowledged"): 6,
        ("leeway_replay_ticket_wait_seconds_count",): 1,
        ("leeway_replay_draw_wait_seconds_count",): 1,
        ("leeway_replay_oldest_group_age_seconds", "open"): 0,
        ("leeway_replay_received_bytes",): 0,
        ("leeway_replay_waiting_bytes",): 0,
        ("leeway_replay_log_stalled",): 0,
        ("leeway_replay_refusals_total", "disk"): 0,
        ("leeway_replay_refusals_total", "pending_bytes"): 0,
    }
    assert {key: values.get(key) for key in expected} == expected
    assert values["leeway_replay_written_bytes_total", "s0"] > 0
    assert values["leeway_replay_log_bytes",] > 0
    assert values["leeway_replay_disk_free_bytes",] > 0
    assert values["leeway_replay_fsync_seconds_count",] > 0
    process.send_signal(signal.SIGTERM)
    assert await ended(process) == (0, [])


def _scrape(address: str) -> str:
    with urlopen(address, timeout=WAIT_SECONDS) as reply:
        return reply.read().decode()


async def test_check_reads_the_configuration_and_nothing_else(tmp_path: Path) -> None:
    assert await ended(await start(tmp_path, "--check")) == (0, [])
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "--set=replay_buffer.lease_seconds=0",
            "replay_buffer.lease_seconds: input should be greater than 0, but is 0",
        ),
        ("--set=replay_buffer.leese_seconds=1", "replay_buffer.leese_seconds: unknown key"),
        ("--set=replay_buffer.soft_free_bytes=1", "hard_free_bytes must not be above soft_free_bytes"),
        ("--set=network.replay_buffer=0.0.0.0:7999", "network.replay_buffer: 0.0.0.0:7999 is beyond loopback"),
    ],
)
async def test_a_bad_configuration_is_one_line_and_not_worth_a_restart(
    tmp_path: Path, ports: tuple[int, list[str]], argument: str, message: str
) -> None:
    code, lines = await ended(await start(tmp_path, *ports[1], argument))
    assert code == 2
    assert len(lines) == 1
    assert message in lines[0]


async def test_a_directory_in_use_is_named(tmp_path: Path, ports: tuple[int, list[str]]) -> None:
    holder = Log(LogOptions(tmp_path / "log"))
    code, lines = await ended(await start(tmp_path, *ports[1]))
    await holder.aclose()
    assert (code, lines) == (
        2,
        [
            f"replay_buffer: replay_buffer.directory: {tmp_path}/log is in use by another replay buffer; "
            "stop that one first"
        ],
    )


async def test_a_damaged_log_is_named_with_its_place(tmp_path: Path, ports: tuple[int, list[str]]) -> None:
    log = Log(LogOptions(tmp_path / "log"))
    log.recover(lambda _payload, _location: None)
    log.start()
    for _ in range(3):
        log.append(b"x" * 10)
    await log.durable()
    await log.aclose()
    path = segment_path(tmp_path / "log", 1)
    path.write_bytes(path.read_bytes().replace(b"xx", b"xy", 1))
    code, lines = await ended(await start(tmp_path, *ports[1]))
    assert code == 2  # a restart would meet the same bytes
    assert len(lines) == 1
    assert lines[0].startswith(f"replay_buffer: {path}: the record at byte 0 is damaged")


async def test_an_index_that_is_found_damaged_ends_it_and_the_next_start_is_well(
    tmp_path: Path, ports: tuple[int, list[str]]
) -> None:
    port, arguments = ports
    process = await start(tmp_path, *arguments)
    await check_health(f"127.0.0.1:{port}", PLAIN, WAIT_SECONDS)
    async with connected(f"127.0.0.1:{port}") as client:
        await client.open_run(spec(groups_per_step=1), ROOT, [])
        (ticket, *_), *_ = await client.acquire_tickets("s0", ROOT, 4, WAIT_SECONDS)
        await write(client, filled(ticket))
        await client.draw_batch(1, 1, WAIT_SECONDS)
        await client.advance(1, version(1), ROOT)
        await client.commit(1, 1)
    process.send_signal(signal.SIGTERM)
    assert await ended(process) == (0, [])
    with closing(sqlite3.connect(tmp_path / "log" / FILE)) as index, index:
        index.execute("UPDATE groups SET body = zeroblob(length(body))")

    process = await start(tmp_path, *arguments)
    await check_health(f"127.0.0.1:{port}", PLAIN, WAIT_SECONDS)
    async with connected(f"127.0.0.1:{port}") as client:
        renewing = asyncio.create_task(client.renew_leases("s0", [(ticket.group_id, 1)]))  # again and again
        code, lines = await ended(process)
        assert code == 1  # a restart mends it
        (line,) = lines
        assert line.startswith(f"replay_buffer: {tmp_path}/log/index.sqlite: an entry fails its checksum;")
        assert line.endswith("start the replay buffer again")

        process = await start(tmp_path, *arguments)
        await check_health(f"127.0.0.1:{port}", PLAIN, WAIT_SECONDS)
        assert await renewing == []
        assert (await client.run_status()).consumed == 1
    process.send_signal(signal.SIGTERM)
    assert await ended(process) == (0, [])
