"""A requirement, how its check ends, and its result."""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from leeway.conformance.session import Session


class Violation(Exception):
    """The server breaks the requirement under test; the message is the finding, in one line."""


class NotSupportedError(Exception):
    """The server does not offer what the requirement is about, or the kit was not given what the check needs."""


def require(holds: object, finding: str) -> None:
    """Raise a Violation unless something holds."""
    if not holds:
        raise Violation(finding)


class Status(enum.Enum):
    """How a requirement ended."""

    PASSED = "passed"
    FAILED = "FAILED"
    SKIPPED = "skipped"  # see NotSupportedError
    NOT_RUN = "not run"  # it builds on a requirement that did not pass


Check = Callable[["Session"], Awaitable[str]]
"""Returns what was seen, in one line; raises Violation or NotSupportedError."""


@dataclass(frozen=True, slots=True)
class Requirement:
    """One clause of the contract.

    Args:
        id: stable name, described in docs/conformance.md.
        title: what must hold.
        check: tests it.
        needs: ids of requirements without which the check says nothing.
    """

    id: str
    title: str
    check: Check
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of a requirement."""

    requirement: Requirement
    status: Status
    detail: str
    seconds: float
