"""`python -m inference_server.worker --backend ADDRESS --config FILE`: feeds a run from a foreign inference backend."""

from __future__ import annotations

import sys

from inference_server.server import main

if __name__ == "__main__":
    sys.exit(main(with_backend=True))
