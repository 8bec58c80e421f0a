"""What a requirement is, and what became of it."""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from leeway.conformance.session import Session


class Status(enum.Enum):
    """How a requirement ended."""

    PASSED = "passed"
    FAILED = "FAILED"
    SKIPPED = "skipped"  # the server does not claim it, or the kit was not given what the check needs
    NOT_RUN = "not run"  # it builds on a requirement that did not pass


Check = Callable[[Session], Awaitable[str]]
"""Returns what was seen, in one line; raises Violation or NotSupportedError."""


@dataclass(frozen=True, slots=True)
class Requirement:
    """One clause of the contract.

    Args:
        id: stable name, described in docs/conformance.md.
        title: what must hold.
        check: looks.
        needs: ids of requirements without which the check says nothing.
    """

    id: str
    title: str
    check: Check
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a requirement."""

    requirement: Requirement
    status: Status
    detail: str
    seconds: float
