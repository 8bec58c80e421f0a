"""SGLang's server ends with the process that started it: what that takes needs no SGLang."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from tests.deadlines import WAIT_SECONDS

pytestmark = pytest.mark.processes

_STARTER = """
import subprocess, sys, os
child = "import os, time; from inference_server.engines.sglang.server import die_with_parent as d; d(os.getppid())"
child += "; print(os.getpid(), flush=True); time.sleep(600)"
subprocess.run([sys.executable, "-c", child])
"""


def test_it_is_killed_when_its_parent_is() -> None:
    with subprocess.Popen([sys.executable, "-c", _STARTER], stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        server = psutil.Process(int(starter.stdout.readline()))
        starter.kill()
        server.wait(WAIT_SECONDS)


def test_it_does_not_start_when_its_parent_is_gone_already() -> None:
    command = [sys.executable, "-m", "inference_server.engines.sglang.server", "1", "--model-path", "none"]
    started = subprocess.run(command, capture_output=True, text=True, check=False, timeout=WAIT_SECONDS)
    assert started.returncode == 1
    assert started.stderr.strip() == "SGLang's server was started by a process that is gone"
