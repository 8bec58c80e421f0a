"""`python -m tests.unit.leeway.stubborn FIFO [wait]`: a service that ends by SIGKILL only, and leaves a process behind.

With `wait` it ends as soon as the other one is there.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    if sys.argv[2:] == ["wait"]:
        Path(sys.argv[1]).read_text()
        sys.exit()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with subprocess.Popen(["cat"]):  # holds this one's pipes until its input ends, which is the supervisor's
        Path(sys.argv[1]).write_text("here")
