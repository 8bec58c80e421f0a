"""Configuration files of the rehearsal, for what needs a whole one and cares about a few keys."""

from __future__ import annotations

from pathlib import Path

from leeway.config import load_configuration

EXAMPLE = Path(__file__).parents[2] / "examples" / "rehearsal.toml"


def write_rehearsal(path: Path, *overrides: str) -> Path:
    """A rehearsal's file with `section.key=value` overrides."""
    load_configuration(EXAMPLE, overrides).write(path)
    return path
