"""A carrier: the process that `carried` starts and kills, and what is shared with it. Torch-free."""

from __future__ import annotations

import logging
import mmap
import os
import socket
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Final

from leeway.errors import ConfigError, UnavailableError

SLOTS: Final = 3
"""One is filled or emptied here while the carrier has the others."""

_MESSAGE_BYTES: Final = 4096

log = logging.getLogger(__name__)


class Carrier:
    """One process, and what is shared with it; it ends when its end of the socket does.

    Whoever sends or receives waits in `answer`; `kill` may come from any thread, and ends that wait.
    """

    def __init__(self, program: Sequence[str], piece_bytes: int, environment: Mapping[str, str]) -> None:
        with ExitStack() as stack:
            memory = os.memfd_create("leeway-pieces")
            stack.callback(os.close, memory)
            os.ftruncate(memory, SLOTS * piece_bytes)
            shared = memoryview(mmap.mmap(memory, SLOTS * piece_bytes))
            self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs, ExitStack() as unless_started:
                unless_started.enter_context(self._control)
                self._process = subprocess.Popen(
                    [
                        *program,
                        *("--control", str(theirs.fileno()), "--memory", str(memory)),
                        *("--piece-bytes", str(piece_bytes)),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=2,  # what libraries print is no output of this process
                    pass_fds=(theirs.fileno(), memory),
                    env={**os.environ, **environment},
                    start_new_session=True,  # signals of a terminal are for this process, which ends it
                )
                unless_started.pop_all()
        self.slots = [shared[slot * piece_bytes : (slot + 1) * piece_bytes] for slot in range(SLOTS)]
        self._name = ""
        self._failed = False
        self._reading = threading.Lock()

    @property
    def was_ready(self) -> bool:
        """Whether it has ever said so."""
        return bool(self._name)

    def wait_until_ready(self, seconds: float) -> str:
        """The name of its library, with versions.

        Raises:
            ConfigError: it says why it cannot work on this machine.
            UnavailableError: it is not ready in time, or has died.
        """
        if not self._name:
            try:
                self._take_name(self.answer(seconds))
            except _CarrierFailedError as error:
                raise ConfigError(error.message) from error
        return self._name

    def is_ready(self) -> bool:
        """Whether it is ready; does not wait."""
        if not self._name and not self._failed and self._reading.acquire(blocking=False):
            try:
                self._take_name(self._message(0.0))
            except BlockingIOError:
                return False
            except UnavailableError as error:
                self._failed = True
                log.error("no broadcasts by this process any more: %s", error.message)
            finally:
                self._reading.release()
        return bool(self._name) and not self._failed and self._process.poll() is None

    def _take_name(self, message: str) -> None:
        word, _, name = message.partition(" ")
        if word != "ready":
            raise UnavailableError(f"the process that carries broadcasts began with {word!r}")
        self._name = name

    def say(self, message: str) -> None:
        """Tell it what to do.

        Raises:
            UnavailableError: it has ended.
        """
        try:
            self._control.send(message.encode())
        except OSError as error:
            raise UnavailableError("the process that carries broadcasts has ended") from error

    def answer(self, seconds: float) -> str:
        """What it says next.

        Raises:
            UnavailableError: nothing in time, or that it failed, or it has ended.
        """
        with self._reading:
            return self._message(seconds)

    def _message(self, seconds: float) -> str:
        self._control.settimeout(seconds)
        try:
            message = self._control.recv(_MESSAGE_BYTES).decode()
        except BlockingIOError:
            raise  # there was no time
        except TimeoutError as error:
            raise UnavailableError(
                f"the process that carries broadcasts said nothing for {seconds:g} seconds"
            ) from error
        except OSError as error:
            raise UnavailableError("the process that carries broadcasts has ended") from error
        if not message:
            raise UnavailableError("the process that carries broadcasts has ended")
        if message.startswith("failed "):
            raise _CarrierFailedError(message.removeprefix("failed "))
        return message

    def kill(self) -> None:
        """End it at once, whatever it does, and tell who waits for it."""
        self._failed = True
        self._process.kill()
        try:
            self._control.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it was the first to go

    def wait_for_end(self, seconds: float) -> bool:
        """Whether it is gone after this time: a driver may keep a killed process for a while."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        with self._reading:  # nobody reads any more: the other end is closed
            self._control.close()
        return True


class _CarrierFailedError(UnavailableError):
    """The carrier said why."""
