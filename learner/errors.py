"""The learner's own branch of the error tree."""

from __future__ import annotations

from typing import ClassVar

import grpc

from leeway.errors import LeewayError


class UnusableGroupError(LeewayError):
    """A drawn group cannot be trained on; names it, and the trajectory at fault. Nothing has changed."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INVALID_ARGUMENT
    reason: ClassVar[str] = "UNUSABLE_GROUP"

    def __init__(self, group_id: str, message: str) -> None:
        super().__init__(f"group {group_id}: {message}")
        self.group_id = group_id
        self.message = message  # without the group, for callers that name it themselves
