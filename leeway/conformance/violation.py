"""What ends a check early."""

from __future__ import annotations


class Violation(Exception):
    """The server breaks the requirement under test; the message is the finding, in one line."""


class NotSupportedError(Exception):
    """The server says that it does not offer what the requirement is about, or the kit was not given what it needs."""


def require(holds: object, finding: str) -> None:
    """Raise a Violation unless something holds."""
    if not holds:
        raise Violation(finding)
