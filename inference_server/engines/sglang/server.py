"""SGLang's server as a process that ends with the one that started it.

`python -m inference_server.engines.sglang.server PARENT ARGUMENTS` takes the process id of the one that starts it, and
the arguments of `sglang.launch_server`.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
from typing import Final

_PR_SET_PDEATHSIG: Final = 1


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent is gone, however it went; SGLang's own processes follow it.

    Asked to terminate, SGLang would first finish its requests, which a paused one never does.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("SGLang's server was started by a process that is gone")


def main() -> None:
    """Run the server with the process's arguments."""
    die_with_parent(int(sys.argv.pop(1)))
    # `sys.modules["__main__"]` stays what was started: it is what spawned processes import first.
    runpy.run_module("sglang.launch_server", run_name="__main__")


if __name__ == "__main__":
    sys.exit(main())
