"""SGLang's server as a process that ends with the one that started it.

`python -m inference_server.engines.sglang_server ARGUMENTS` takes the arguments of `sglang.launch_server`.
"""

from __future__ import annotations

import ctypes
import runpy
import signal
import sys
from typing import Final

_PR_SET_PDEATHSIG: Final = 1


def die_with_parent() -> None:
    """Ask the kernel to end this process when its parent is gone, however it went."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def main() -> None:
    """Run the server with the process's arguments."""
    die_with_parent()
    # `sys.modules["__main__"]` stays what was started: it is what spawned processes import first.
    runpy.run_module("sglang.launch_server", run_name="__main__")


if __name__ == "__main__":
    sys.exit(main())
