"""`metrics.jsonl`: one line per step and per evaluation, for the surviving history only.

A learner that resumes at step s drops what an abandoned branch wrote beyond s, so the file always reads as one curve.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from leeway.service.durable import replace_file


class Journal:
    """Appends records; each has `kind` ("step" or "evaluation") and `step`."""

    def __init__(self, path: Path, *, resume_step: int, listen: Callable[[str], None] | None = None) -> None:
        """Open `path`, keeping records up to `resume_step`; `listen` is told each new line."""
        self._listen = listen
        self.records = [record for record in read_journal(path) if record["step"] <= resume_step]
        replace_file(path, "".join(_line(record) for record in self.records))
        self._file = path.open("a", encoding="utf-8")

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record and pass it on."""
        self.records.append(dict(record))
        line = _line(record)
        self._file.write(line)
        self._file.flush()
        if self._listen is not None:
            self._listen(line)

    def sync(self) -> None:
        """Make what was written durable; called with each checkpoint."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Every whole record of a journal; it ends where a crash has torn it."""
    if not path.exists():
        return []
    records: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            records.append(json.loads(line[: line.index(b"\n")]))
        except ValueError:
            break
    return records


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"
