"""`leeway serve inference-server --config FILE --index I`: one inference server of a run."""

from __future__ import annotations

import sys

from inference_server.server import main

if __name__ == "__main__":
    sys.exit(main())
