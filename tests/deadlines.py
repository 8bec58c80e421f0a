"""How long a test waits for what has to come: so long that no slow machine meets it, only a test that hangs."""

from __future__ import annotations

from typing import Final

WAIT_SECONDS: Final = 120.0
"""For an answer, an event, a process that starts or ends."""
RUN_SECONDS: Final = 500.0
"""For a run of several processes from its start to its end."""
