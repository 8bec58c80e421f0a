"""What the forked processes run: the services' own entry points."""

from __future__ import annotations

from typing import Final

import inference_server.server
import learner.__main__
import replay_buffer.__main__

_SEGMENT_BYTES: Final = 32 << 10


def run_replay_buffer() -> int:
    """`python -m replay_buffer`, with segments so small that a rehearsal fills many, each with its snapshot."""
    read_options = replay_buffer.__main__.read_options
    replay_buffer.__main__.read_options = lambda document: read_options(document).model_copy(
        update={"segment_bytes": _SEGMENT_BYTES}
    )
    return replay_buffer.__main__.main()


def run_learner() -> int:
    """`python -m learner`."""
    return learner.__main__.main()


def run_server() -> int:
    """`python -m inference_server`."""
    return inference_server.server.main()
