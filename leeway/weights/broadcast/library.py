"""What carries broadcasts, as the learner and the servers see it. Torch-free."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Protocol

Part = bytes | memoryview


class Group(Protocol):
    """Members of one broadcast after the other. Blocking: lives in threads, one at a time."""

    size: int
    """Members, the learner included."""

    def send(self, parts: Sequence[Part]) -> Generator[int]:
        """Broadcast parts, piece by piece; yields the bytes of each when it is on its way.

        Raises:
            UnavailableError: a member is gone or silent; the group is of no more use.
        """
        ...

    def receive(self, memory: memoryview) -> Generator[int]:
        """Take parts, piece by piece; yields how many bytes of memory are there, while the next piece comes.

        Raises:
            UnavailableError: the sender or another member is gone or silent; the group is of no more use.
        """
        ...

    def close(self) -> None:
        """Leave, which ends the group for the others, too. Any thread may call it, also while another waits here."""
        ...


class Library(Protocol):
    """How groups are formed, and what carries their pieces."""

    piece_bytes: int
    """Bytes of one broadcast, the same for all members."""

    @property
    def name(self) -> str:
        """With versions: all members must have the same. Empty while nothing is known of it: see `prepare`."""
        ...

    @property
    def usable(self) -> bool:
        """Whether a group could be formed at this moment; never waits."""
        ...

    def prepare(self) -> None:
        """Be ready, and have a name. Blocking.

        Raises:
            ConfigError: this machine cannot take part.
            UnavailableError: it is not ready in time.
        """
        ...

    def join(self, address: tuple[str, int], number: int, rank: int, size: int, patience_seconds: float) -> Group:
        """Become a member. Blocking.

        Args:
            address: the rendezvous.
            number: of the group, the same for all members.
            rank: place in it; 0 sends.
            size: members.
            patience_seconds: longest wait for the others while the group forms, and for each piece afterwards.

        Raises:
            UnavailableError: the rendezvous cannot be reached, or the others did not come.
        """
        ...

    def close(self) -> None:
        """Release everything; whoever waits here is told that it is over."""
        ...
