"""What the forked processes run: the services' own entry points."""

from __future__ import annotations

import inference_server.server
import learner.__main__
import replay_buffer.__main__
from leeway.process import service_parser


def run_replay_buffer() -> int:
    """`python -m replay_buffer`."""
    return replay_buffer.__main__.main(service_parser("replay_buffer", "").parse_args())


def run_learner() -> int:
    """`python -m learner`."""
    return learner.__main__.main()


def run_server() -> int:
    """`python -m inference_server`."""
    return inference_server.server.main()
