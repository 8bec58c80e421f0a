"""The processes of a run, forked from one that has imported everything: real processes, started in milliseconds.

The conductor has a single thread and no connections, so a fork of it is clean. Each child gets its arguments as
`python -m` would give them, its own session, its output in a file, and the reading end of a pipe as standard input,
which ends when the conductor is gone. What a service syncs is witnessed, so that a loss of power can be played after a
kill.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.harness.disks import LEDGER, Losses, Witness, power_loss


@dataclass(frozen=True, slots=True)
class Program:
    """What a process runs: `main()` returns its exit code and reads `sys.argv`."""

    name: str
    main: Callable[[], int]
    argv: tuple[str, ...]
    log_path: Path
    disk: Path | None = None  # what it keeps below here is lost with its power
    ledger: Path | None = None
    before: Callable[[], None] | None = None  # runs in the child first


class Child:
    """One process."""

    def __init__(self, program: Program, lifeline: tuple[int, int]) -> None:
        self.program = program
        sys.stdout.flush()
        sys.stderr.flush()
        self.process_id = os.fork()
        if not self.process_id:
            _become(program, lifeline)
        self.descriptor = os.pidfd_open(self.process_id)
        self.stopped = False

    def fileno(self) -> int:
        """Readable when the process has ended."""
        return self.descriptor

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        signal.pidfd_send_signal(self.descriptor, number)
        self.stopped = (self.stopped or number is signal.SIGSTOP) and number is not signal.SIGCONT

    def wait(self) -> int:
        """Its exit code, negative for a signal; blocks until it has ended."""
        _, status = os.waitpid(self.process_id, 0)
        os.close(self.descriptor)
        return os.waitstatus_to_exitcode(status)

    def last_line(self) -> str:
        """The last line that it, or one before it, has printed."""
        lines = self.program.log_path.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


def lose_power(program: Program, rng: Random, *, merciless: bool) -> Losses:
    """Play a loss of power on a dead process's disk."""
    if program.disk is None or program.ledger is None or not (program.ledger / LEDGER).exists():
        return Losses()
    return power_loss(program.disk, program.ledger, rng, merciless=merciless)


def _become(program: Program, lifeline: tuple[int, int]) -> None:
    """Never returns."""
    code = 70
    try:
        os.setsid()
        reading, writing = lifeline
        os.dup2(reading, 0)
        os.close(writing)
        output = os.open(program.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        sys.stdin = os.fdopen(0)
        sys.argv = [program.name, *program.argv]
        if program.disk is not None and program.ledger is not None:
            Witness(program.disk, program.ledger).install()
        if program.before is not None:
            program.before()
        code = program.main()
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 1
    except BaseException:  # noqa: BLE001 (a process boundary: what it died of goes to its log)
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
