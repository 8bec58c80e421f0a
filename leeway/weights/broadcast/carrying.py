"""The carrier's side: a process that broadcasts pieces through the memory of a device.

    socket ──> reader thread ──> commands ──> slot ── copy ──> device ── broadcast ──> peers                  "send"
                   │                          slot <── copy ── device <── broadcast ── rank 0                 "receive"
                   └── its end: the process ends, whatever else it waits for

Pieces go one after the other, in the order of the commands, two on their way at a time: while one is copied the next is
broadcast. The first error is answered and ends the process. What differs between NCCL and a device that tests put in
its place is a `Device`.
"""

from __future__ import annotations

import argparse
import mmap
import os
import queue
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, Protocol

import torch

from leeway.errors import LeewayError, UnavailableError
from leeway.weights.broadcast.calls import begin, finish, one_line
from leeway.weights.broadcast.carrier import SLOTS
from leeway.weights.broadcast.rendezvous import Store, meet

_PIECES_ON_THEIR_WAY: Final = 2
_MESSAGE_CHARACTERS: Final = 900

_Work = Any
ProcessGroup = Any  # of torch.distributed


class Device(Protocol):
    """Where pieces are staged, and the process groups that broadcast from there."""

    name: str
    """Of the library, with versions: all members must have the same."""
    identity: str
    """Of this device, among all hosts: no two members of a group may have the same."""
    device: torch.device

    def pin(self, memory: torch.Tensor) -> None:
        """Let the device copy from and to this host memory [n] directly."""
        ...

    def form(
        self, store: Store, address: tuple[str, int], rank: int, size: int, patience_seconds: float
    ) -> ProcessGroup:
        """A process group; its broadcasts end or fail within the patience.

        Raises:
            UnavailableError, RuntimeError: it cannot be formed.
        """
        ...

    def leave(self, group: ProcessGroup) -> None:
        """End a process group, whatever the others do."""
        ...


@dataclass(frozen=True, slots=True)
class _Piece:
    """A broadcast on its way."""

    work: _Work
    staged: torch.Tensor  # [n] on the device
    slot: torch.Tensor | None  # [n] on the host, where it is to go; None for the sender


class Member:
    """This device in one group after the other.

    Args:
        device: where pieces are staged.
        slots: host memory [piece_bytes] each, shared with who gives the commands.
    """

    def __init__(self, device: Device, slots: Sequence[torch.Tensor]) -> None:
        self._device = device
        self._slots = slots
        for slot in slots:
            device.pin(slot)
        self._staging = [torch.empty_like(slot, device=device.device) for slot in slots]
        self._group: ProcessGroup | None = None
        self._patience = timedelta()
        self._waiting: deque[_Piece] = deque()

    @property
    def waiting(self) -> int:
        """Pieces on their way."""
        return len(self._waiting)

    def form(self, host: str, port: int, number: int, rank: int, size: int, patience_seconds: float) -> None:
        """Leave the group so far and become a member of another one.

        Raises:
            UnavailableError, RuntimeError: it does not form.
        """
        left, self._group = self._group, None
        if left is not None:
            self._device.leave(left)
        self._patience = timedelta(seconds=patience_seconds)
        store = meet((host, port), number, patience_seconds)
        self._meet_others(store, rank, size)
        self._group = self._device.form(store, (host, port), rank, size, patience_seconds)
        # The first broadcast makes the connections; who fails then has not been told that the group is formed.
        finish(begin(self._group, torch.zeros(1, dtype=torch.uint8, device=self._device.device), self._patience))

    def send(self, slot: int, size_bytes: int) -> None:
        """Begin to broadcast what is in the slot."""
        staged = self._staging[slot][:size_bytes]
        staged.copy_(self._slots[slot][:size_bytes], non_blocking=True)  # the broadcast comes after it on the device
        self._waiting.append(_Piece(begin(self._group, staged, self._patience), staged, None))

    def receive(self, slot: int, size_bytes: int) -> None:
        """Begin to take what is to be in the slot."""
        staged = self._staging[slot][:size_bytes]
        work = begin(self._group, staged, self._patience)
        self._waiting.append(_Piece(work, staged, self._slots[slot][:size_bytes]))

    def finish(self) -> None:
        """Wait for the end of the oldest piece; the slot may then be read, or used again."""
        piece = self._waiting.popleft()
        finish(piece.work)
        if piece.slot is not None:
            piece.slot.copy_(piece.staged)  # waits for it

    def _meet_others(self, store: Store, rank: int, size: int) -> None:
        """Wait until all are there, each with a device of its own: NCCL would say it less plainly, or hang."""
        keys = [f"device/{other}" for other in range(size)]
        store.set(keys[rank], self._device.identity)
        try:
            store.wait(keys, self._patience)
        except RuntimeError as error:
            missing = " and ".join(f"rank {other}" for other, key in enumerate(keys) if not store.check([key]))
            raise UnavailableError(f"a group of {size} for a broadcast did not form: {missing} did not come") from error
        ranks: dict[bytes, int] = {}
        for other, key in enumerate(keys):
            first = ranks.setdefault(store.get(key), other)
            if first != other:
                raise UnavailableError(
                    f"ranks {first} and {other} of a broadcast are both on {store.get(key).decode()}; set "
                    "CUDA_VISIBLE_DEVICES so that the learner and every server have a first GPU of their own, or "
                    'network.weights = "collective"'
                )


def carry(make_device: Callable[[], Device], argv: Sequence[str] | None = None) -> None:
    """Be a carrier until whoever started it closes the socket, or something fails; never returns."""
    parser = argparse.ArgumentParser()
    for name in ("--control", "--memory", "--piece-bytes"):
        parser.add_argument(name, type=int, required=True)
    arguments = parser.parse_args(argv)
    control = socket.socket(fileno=arguments.control)
    commands: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(control, commands), daemon=True).start()
    try:
        shared = torch.frombuffer(mmap.mmap(arguments.memory, SLOTS * arguments.piece_bytes), dtype=torch.uint8)
        size = arguments.piece_bytes
        device = make_device()
        member = Member(device, [shared[slot * size : (slot + 1) * size] for slot in range(SLOTS)])
        control.send(f"ready {device.name}".encode())
        while True:
            _step(member, commands, control)
    except (LeewayError, RuntimeError, ValueError, OSError) as error:
        message = error.message if isinstance(error, LeewayError) else one_line(error)
        with suppress(OSError):
            control.send(f"failed {message[:_MESSAGE_CHARACTERS]}".encode())
    # Not by way of destructors and handlers at exit, which may wait for a device that does not answer.
    os._exit(1)


def _step(member: Member, commands: queue.SimpleQueue[str], control: socket.socket) -> None:
    """Begin the next piece, or finish the oldest where enough are on their way or nothing else is to be done."""
    if member.waiting == _PIECES_ON_THEIR_WAY or (member.waiting and commands.empty()):
        member.finish()
        control.send(b"done")
        return
    # Without a deadline: who gives the commands may take its time, and its end ends this process.
    match commands.get().split():
        case ["form", host, port, number, rank, size, patience_seconds]:
            member.form(host, int(port), int(number), int(rank), int(size), float(patience_seconds))
            control.send(b"formed")
        case ["send", slot, size_bytes]:
            member.send(int(slot), int(size_bytes))
        case ["receive", slot, size_bytes]:
            member.receive(int(slot), int(size_bytes))
        case words:
            raise UnavailableError(f"a carrier knows no command {words}")


def _read(control: socket.socket, commands: queue.SimpleQueue[str]) -> None:
    with suppress(OSError):
        while message := control.recv(1024):
            commands.put(message.decode())
    os._exit(0)
