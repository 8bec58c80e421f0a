"""What the forked processes run: the services' own entry points."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import inference_server.server
import learner.__main__
import replay_buffer.__main__
from leeway.config import RunConfiguration

_SEGMENT_BYTES: Final = 32 << 10


def run_replay_buffer() -> int:
    """`python -m replay_buffer`, with segments so small that a rehearsal fills many, each with its snapshot."""
    load_configuration = replay_buffer.__main__.load_configuration

    def with_small_segments(path: Path, overrides: Sequence[str] = ()) -> RunConfiguration:
        configuration = load_configuration(path, overrides)
        options = configuration.replay_buffer.model_copy(update={"segment_bytes": _SEGMENT_BYTES})
        return configuration.model_copy(update={"replay_buffer": options})

    replay_buffer.__main__.load_configuration = with_small_segments
    return replay_buffer.__main__.main()


def run_learner() -> int:
    """`python -m learner`."""
    return learner.__main__.main()


def run_server() -> int:
    """`python -m inference_server`."""
    return inference_server.server.main()
