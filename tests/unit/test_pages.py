"""What the pages name is there."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
PAGES = sorted([*CHECKOUT.glob("*.md"), *CHECKOUT.glob("docs/*.md"), *CHECKOUT.glob("*/README.md")])
_OURS = (
    "benchmarks",
    "deploy",
    "docs",
    "examples",
    "inference_server",
    "learner",
    "leeway",
    "proto",
    "replay_buffer",
    "tests",
)
_NAMED = re.compile(rf"`((?:{'|'.join(_OURS)})/[\w./-]*)`")
_LINKED = re.compile(r"\]\((?!https?:)([^)#]+)")
_MODULE = re.compile(r"python -m ((?:benchmarks|tests|replay_buffer|learner|inference_server)[\w.]*)")


def relative(page: Path) -> str:
    return str(page.relative_to(CHECKOUT))


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = [CHECKOUT / path for path in _NAMED.findall(text) if not path.endswith("NAME.py")]
    linked = [page.parent / path for path in _LINKED.findall(text)]
    modules = [CHECKOUT / name.replace(".", "/") for name in _MODULE.findall(text)]
    modules = [module if module.is_dir() else module.with_suffix(".py") for module in modules]
    assert [str(path) for path in (*named, *linked, *modules) if not path.exists()] == []


def test_the_patterns_find_something() -> None:
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    for pattern in (_NAMED, _LINKED, _MODULE):
        assert sum(len(pattern.findall(text)) for text in texts) > 10, pattern.pattern


def test_every_test_that_a_page_names_is_there() -> None:
    named = {name for page in PAGES for name in re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8"))}
    defined = {
        name
        for file in CHECKOUT.glob("tests/**/*.py")
        for name in re.findall(r"def (test_\w+)", file.read_text(encoding="utf-8"))
    }
    assert len(named) >= 10
    assert named - defined == set()


def test_the_drawing_is_that_of_its_source() -> None:
    source = (CHECKOUT / "docs" / "architecture.dot").read_bytes()
    drawing = (CHECKOUT / "docs" / "architecture.svg").read_text(encoding="utf-8")
    assert f"<!-- drawn from {hashlib.sha256(source).hexdigest()} -->" in drawing, "run: make diagrams"


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_pages_are_wrapped_at_100_columns(page: Path) -> None:
    """Tables, links that stand alone and code keep their lines."""
    lines = page.read_text(encoding="utf-8").splitlines()
    long, in_code = [], False
    for number, line in enumerate(lines, start=1):
        in_code ^= line.startswith("```")
        is_prose = not (in_code or line.startswith(("|", "![", "[")))
        if is_prose and len(line) > 100:
            long.append(f"{number}: {line}")
    assert long == []
