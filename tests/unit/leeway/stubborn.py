"""`python -m tests.unit.leeway.stubborn FIFO [wait]`: a service that ends by SIGKILL only, and leaves processes behind.

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
    # Both hold its pipes. One is in a group of its own, and ends with its input, which is the supervisor's.
    with subprocess.Popen(["cat"], start_new_session=True), subprocess.Popen(["sleep", "600"]):
        Path(sys.argv[1]).write_text("here")
