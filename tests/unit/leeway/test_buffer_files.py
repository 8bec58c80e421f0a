"""`leeway buffer verify | ls | show | export` on a directory."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from leeway.cli import buffer_export
from leeway.cli.main import main
from leeway.types import TrajectoryFailure, WriteItem
from replay_buffer.storage.segments import HEADER, segment_path
from tests.harness.configurations import write_rehearsal
from tests.harness.replay_builders import RUN, chunk
from tests.harness.replay_directory import opened

STEPS, PER_STEP, MEMBERS, TOKENS = 4, 2, 2, 7


@pytest.fixture
async def log(tmp_path: Path) -> Path:
    """Four steps, a failed group, and one that is being written."""
    directory = tmp_path / "replay"
    async with opened(directory) as run:
        await run.open_run()
        for _ in range(STEPS):
            await run.step()
        tickets, *_ = await run.buffer.acquire_tickets(RUN, "s0", run.state.head, 4, 0)
        failure = TrajectoryFailure("the prompt is too long", retryable=False)
        run.buffer.write(RUN, [WriteItem(tickets[0].members[0].trajectory_id, 1, 0, failure)])
        run.buffer.write(RUN, [WriteItem(tickets[1].members[0].trajectory_id, 1, 0, chunk([run.state.head]))])
    return directory


def test_verify_says_what_it_checked_and_what_is_wrong(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["buffer", "verify", str(log)]) == 0
    assert capsys.readouterr().out.endswith("OK\n")
    path = segment_path(log, 1)
    data = bytearray(path.read_bytes())
    data[HEADER.size] ^= 1
    path.write_bytes(data)
    assert main(["buffer", "verify", str(log)]) == 1
    out = capsys.readouterr().out
    assert f"problem: {path}: the record at byte 0 is damaged" in out
    assert out.endswith("1 problem found\n")


def test_a_runs_folder_stands_for_its_log(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rehearsal(log.parent / "config.toml", f"replay_buffer.directory={log}")
    assert main(["buffer", "verify", str(log.parent)]) == 0
    assert capsys.readouterr().out.endswith("OK\n")


def test_ls_lists_runs_groups_and_segments(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["buffer", "ls", str(log), "--limit", "0"]) == 0
    out = capsys.readouterr().out
    assert f"run {RUN}: epoch 1, head" in out
    assert f"{STEPS * PER_STEP} consumed, 1 dropped" in out
    assert "dropped (failed)" in out
    assert main(["buffer", "ls", str(log), "--state", "consumed", "--step", "2"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{RUN}-g")]
    assert len(rows) == PER_STEP
    assert all("consumed" in row and "2/2" in row for row in rows)
    assert main(["buffer", "ls", str(log), "--segments"]) == 0
    assert str(segment_path(log, 2).stat().st_size) in capsys.readouterr().out


def test_show_describes_a_group_or_a_trajectory(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["buffer", "show", str(log), f"{RUN}-g1"]) == 0
    out = capsys.readouterr().out
    assert f"group {RUN}-g1 of run {RUN}, train" in out
    assert out.count("7 tokens, stop, reward 1") == MEMBERS
    assert main(["buffer", "show", str(log), f"{RUN}-g1.1"]) == 0
    out = capsys.readouterr().out
    assert "token_ids [0, 7), behavior_logprobs [3, 7)" in out
    assert "TrajectoryClosed" in out
    assert f"{RUN}-g1.0" not in out
    assert main(["buffer", "show", str(log), "nothing"]) == 1
    assert "no group or trajectory 'nothing'" in capsys.readouterr().err


def test_export_writes_a_line_per_trajectory(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.jsonl"
    assert main(["buffer", "export", str(log), str(output), "--state", "consumed"]) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(lines) == STEPS * PER_STEP * MEMBERS
    first = lines[0]
    assert (first["group_id"], first["step"], first["reward"], first["finish_reason"]) == (f"{RUN}-g1", 1, 1.0, "stop")
    assert first["token_ids"] == [5] * TOKENS
    assert first["behavior_logprobs"] == [0, 0, 0, -1, -1, -1, -1]
    assert first["loss_mask"] == [0, 0, 0, 1, 1, 1, 1]
    assert first["versions"] == [[3, 7, 0, 0]]
    assert lines[-1]["step"] == STEPS
    assert lines[-1]["versions"][0][2:] != [0, 0]
    capsys.readouterr()
    assert main(["buffer", "export", str(log), str(output)]) == 2
    assert "exists" in capsys.readouterr().err


def test_export_writes_columns(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["buffer", "export", str(log), str(tmp_path / "all.safetensors"), "--step", "2"]) == 0
    arrays = load_file(tmp_path / "all.safetensors")
    count = PER_STEP * MEMBERS
    np.testing.assert_array_equal(arrays["offsets"], np.arange(count + 1) * TOKENS)
    assert arrays["token_ids"].shape == (count * TOKENS,)
    assert arrays["token_ids"].dtype == np.int32
    np.testing.assert_array_equal(arrays["version_step"][:TOKENS], [-1, -1, -1, 0, 0, 0, 0])
    np.testing.assert_array_equal(arrays["step"], [2] * count)
    np.testing.assert_array_equal(arrays["reward"], np.ones(count))
    monkeypatch.setattr(buffer_export, "_FILE_BYTES", 3 * TOKENS * 25)
    assert main(["buffer", "export", str(log), str(tmp_path / "parts.safetensors"), "--state", "consumed"]) == 0
    parts = sorted(tmp_path.glob("parts*.safetensors"))
    assert len(parts) > 3
    assert sum(len(load_file(part)["reward"]) for part in parts) == STEPS * PER_STEP * MEMBERS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out.csv"], "name a file that ends in .jsonl or .safetensors"),
        (["out.jsonl", "--columns", "routing,colour"], "--columns: colour is none of topk, routing"),
        (["out.jsonl", "--run", "other"], "no run 'other'; there are: test-run"),
    ],
)
def test_what_makes_no_sense_is_refused(
    log: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["buffer", "export", str(log), *arguments]) != 0
    assert message in capsys.readouterr().err
