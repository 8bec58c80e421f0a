"""`leeway fleet` on a run that is not going: it starts a buffer on the log."""

from __future__ import annotations

from pathlib import Path

import pytest

from leeway.cli.main import main
from leeway.types import DrainReason
from tests.deadlines import WAIT_SECONDS
from tests.harness.buffer_server import connected, serving
from tests.harness.configurations import write_rehearsal
from tests.harness.replay_builders import DATASET, ROOT, RUN, SIGNATURE, spec

pytestmark = pytest.mark.processes


@pytest.fixture
async def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / RUN
    folder.mkdir()
    write_rehearsal(folder / "config.toml", f"run.name={RUN}", f"run.directory={tmp_path}")
    async with serving(folder / "replay") as address, connected(address) as client:
        await client.open_run(spec(), ROOT, [])
        for server_id in ("s0", "s1"):
            await client.join_run(server_id, SIGNATURE, DATASET, WAIT_SECONDS)
        await client.drain_server("s0", DrainReason.DIVERGING, "2.1 nats from the others")
    return folder


def test_servers_are_listed_drained_and_readmitted(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def leeway(command: str, *arguments: str) -> tuple[int, str]:
        code = main(["fleet", command, str(run_folder), *arguments])
        output = capsys.readouterr()
        return code, output.out + output.err

    code, listed = leeway("ls")
    assert code == 0, listed
    assert "drained (diverging), gone" in listed
    assert "UTC: 2.1 nats from the others" in listed
    code, refused = leeway("drain", "s1", "--message", "new driver")
    assert code == 2
    assert "'s1' is the only active one and stays in the run (new driver)" in refused
    assert leeway("drain", "s1", "--force") == (0, "s1 is drained (operator): drained by hand\n")
    assert leeway("readmit", "s0") == (0, "s0 is readmitted\n")
    assert leeway("readmit", "s0") == (0, "s0 was not drained\n")
    _, listed = leeway("ls")
    assert "s0" not in listed
    assert "drained (operator)" in listed
