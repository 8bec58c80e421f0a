"""Two learners never write to one run's folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from learner.run_artifacts.run_lock import FILE, held_run
from leeway.errors import ConfigError, UnavailableError
from tests.deadlines import WAIT_SECONDS

EXAMPLE = Path(__file__).parents[4] / "examples" / "rehearsal.toml"
HOLDER = """
import signal, sys
from pathlib import Path
from learner.run_artifacts.run_lock import held_run

with held_run(Path(sys.argv[1])):
    print("held", flush=True)
    signal.pause()
"""


def test_a_second_learner_is_refused_by_name_until_the_first_has_ended(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    with held_run(run):
        with (
            pytest.raises(
                UnavailableError, match=f"one: another learner, process {os.getpid()}, is running"
            ) as refused,
            held_run(run),
        ):
            pass
        assert "stop it, or wait until it ends" in refused.value.message
    with held_run(run):
        pass


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.processes
def test_the_lock_ends_with_its_process_however_it_ends(tmp_path: Path, how: signal.Signals) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UnavailableError, match=f"process {holder.pid}"), held_run(tmp_path):
            pass
        holder.send_signal(signal.SIGSTOP)  # a process that hangs still holds it
        with pytest.raises(UnavailableError), held_run(tmp_path):
            pass
        holder.send_signal(signal.SIGCONT)
        holder.send_signal(how)
        holder.communicate(timeout=WAIT_SECONDS)
        with held_run(tmp_path):
            assert (tmp_path / FILE).read_text() == f"{os.getpid()}\n"
    finally:
        holder.kill()
        holder.communicate(timeout=WAIT_SECONDS)


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    with pytest.raises(ConfigError, match=r"learner\.lock: cannot be used: Is a directory"), held_run(tmp_path):
        pass


@pytest.mark.processes
def test_a_learner_process_is_refused_before_it_touches_anything(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "rehearsal"
    with held_run(run):
        before = sorted(run.iterdir())
        ended = subprocess.run(
            [sys.executable, "-m", "learner", "--config", str(EXAMPLE), f"--set=run.directory={tmp_path / 'runs'}"],
            capture_output=True,
            text=True,
            timeout=WAIT_SECONDS,
        )
        assert sorted(run.iterdir()) == before
    assert ended.returncode == 1  # another start may succeed
    assert ended.stderr.splitlines()[-1].startswith(
        f"learner: {run}: another learner, process {os.getpid()}, is running"
    )
