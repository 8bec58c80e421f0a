"""`python -m replay_buffer` whose log is never synced: what group commit is compared with. Takes the same arguments."""

from __future__ import annotations

import sys

from replay_buffer.__main__ import main
from replay_buffer.storage.segments import AppendFile


def _return_at_once(_: AppendFile) -> None:
    """In place of fdatasync."""


if __name__ == "__main__":
    AppendFile.sync = _return_at_once
    sys.exit(main())
