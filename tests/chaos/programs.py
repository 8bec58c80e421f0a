"""The processes of a chaos run: the services' own entry points, after their faults are set up."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

import inference_server.server
import learner.__main__
import replay_buffer.__main__
from leeway.config import RunConfiguration
from tests.chaos.archive import install_archive
from tests.chaos.fault_controls import FaultControls, install_clock, install_disk
from tests.chaos.plan import BUFFER, LEARNER
from tests.chaos.planted import BUGS
from tests.harness.disks import LEDGER, Losses, Witness, power_loss

_SEGMENT_BYTES: Final = 32 << 10


@dataclass(frozen=True, slots=True)
class Faults:
    """What is done to a service's process before its entry point is called; plain values, for a process to receive."""

    controls: Path
    seed: str
    disk: Path | None = None  # files below it are lost with the power
    ledger: Path | None = None
    archive: Path | None = None  # what a buffer with retention removes is kept here
    bug: str = ""


@dataclass(frozen=True, slots=True)
class Program:
    """A process of a run."""

    name: str
    target: Callable[..., int]
    arguments: tuple[Any, ...]
    log_path: Path
    faults: Faults | None = None


def service(name: str, argv: tuple[str, ...], log_path: Path, faults: Faults) -> Program:
    """A service as `leeway run` would start it."""
    return Program(name, run_service, (name, argv, faults), log_path, faults)


def lose_power(program: Program, rng: Random, *, lose_all: bool) -> Losses:
    """Play a loss of power on a dead process's disk."""
    faults = program.faults
    if faults is None or faults.disk is None or faults.ledger is None or not (faults.ledger / LEDGER).exists():
        return Losses()
    return power_loss(faults.disk, faults.ledger, rng, lose_all=lose_all)


def run_service(connection: object, name: str, argv: tuple[str, ...], faults: Faults) -> int:
    """Be a service; the messages' pipe is only its standard input."""
    del connection
    controls = FaultControls(faults.controls)
    if faults.disk is not None and faults.ledger is not None:
        Witness(faults.disk, faults.ledger).install()
    install_clock(controls)
    if name == BUFFER:
        install_disk(controls, Random(f"{faults.seed}/{os.getpid()}"))
        if faults.archive is not None:
            install_archive(faults.archive)
    if faults.bug:
        BUGS[faults.bug].install()
    main = {BUFFER: _replay_buffer, LEARNER: learner.__main__.main}.get(name, inference_server.server.main)
    return main(argv)


def _replay_buffer(argv: Sequence[str]) -> int:
    """With segments so small that a rehearsal fills many, each with its snapshot."""
    load_configuration = replay_buffer.__main__.load_configuration

    def with_small_segments(path: Path, overrides: Sequence[str] = ()) -> RunConfiguration:
        configuration = load_configuration(path, overrides)
        options = configuration.replay_buffer.model_copy(update={"segment_bytes": _SEGMENT_BYTES})
        return configuration.model_copy(update={"replay_buffer": options})

    replay_buffer.__main__.load_configuration = with_small_segments
    return replay_buffer.__main__.main(argv)
