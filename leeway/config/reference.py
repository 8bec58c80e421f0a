"""Every key of a configuration, told from the models: for docs/configuration.md and for `leeway config`."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Final, Literal, cast, get_args, get_origin

import annotated_types
import tomli_w
from pydantic import AfterValidator
from pydantic.fields import FieldInfo

from leeway.config.configuration import RunConfiguration
from leeway.config.document import Options, Registered
from leeway.errors import NotFoundError

_NAMES: Final = {int: "integer", float: "number", bool: "boolean", str: "string", Path: "path", dict: "table"}
_WIDTH: Final = 100
_EXAMPLES: Final = {
    "run.name": '"sortmix8"',
    "run.steps": "300",
    "run.groups_per_step": "24",
    "model.path": '"sortmix8/model-moe"',
    "task.tasks": '"sortmix8.task:tasks"',
    "task.reward": '"sortmix8.task:reward"',
    "sampling.max_tokens": "9",
    "replay_buffer.directory": '"/var/lib/leeway/replay"',
}
"""Values of keys without a default, in the examples."""
_HEAD: Final = """\
# Configuration

One TOML file configures a run. `leeway run FILE` and the services read all of it. They refuse
unknown keys, values out of range, and sections that contradict each other before anything starts;
`leeway run FILE --check` does only that. `--set section.key=value` overrides a key. Relative paths
start at the file's own directory. `leeway config SECTION.KEY` prints what this page says of a key,
`leeway config --file FILE SECTION.KEY` its value in a file.

This page is generated from the models in `leeway/config`: `leeway config --markdown`.
"""


@dataclass(frozen=True, slots=True)
class Key:
    """One key, in words.

    Args:
        name: its name within the section.
        type: what its value is, with the choices where there are few.
        default: as TOML; "required" or "unset" where there is none.
        range: bounds of a number; empty for none.
        meaning: a sentence.
    """

    name: str
    type: str
    default: str
    range: str
    meaning: str


@dataclass(frozen=True, slots=True)
class Section:
    """One section: its name, what it is about, and its keys."""

    name: str
    about: str
    keys: tuple[Key, ...]

    def example(self) -> str:
        """A few of its keys as TOML, at their defaults; TOML knows no unset key."""
        lines = [f"{key.name} = {_EXAMPLES.get(f'{self.name}.{key.name}', key.default)}" for key in self.keys]
        shown = [line for line in lines if not line.endswith(("= required", "= unset"))]
        return "\n".join([f"[{self.name}]", *shown[:3]])


def sections() -> list[Section]:
    """All sections, in the order of the file; a section stands before those within it."""
    return [part for name, field in RunConfiguration.model_fields.items() for part in _sections(name, field)]


def _sections(name: str, field: FieldInfo) -> Iterator[Section]:
    model = _model(field)
    assert model is not None
    about = (model.__doc__ or "").partition("]: ")[2]
    keys = {key: inner for key, inner in model.model_fields.items() if _model(inner) is None}
    yield Section(name, about[:1].upper() + about[1:], tuple(_key(key, inner) for key, inner in keys.items()))
    for key, inner in model.model_fields.items():
        if key not in keys:
            yield from _sections(f"{name}.{key}", inner)


def _model(field: FieldInfo) -> type[Options] | None:
    """The section that a field holds; None for a value."""
    parts = (field.annotation, *get_args(field.annotation))
    return next((part for part in parts if isinstance(part, type) and issubclass(part, Options)), None)


def _key(name: str, field: FieldInfo) -> Key:
    default = "required"
    if name == "directory" and field.is_required():
        default = "unset"  # the only required key that is filled in: the log's folder
    elif not field.is_required():
        value: Any = field.get_default(call_default_factory=True)
        default = "unset" if value is None else _toml(value)
    return Key(name, _type(field.annotation, field.metadata), default, _range(field.metadata), field.description or "")


def _toml(value: Any) -> str:  # noqa: ANN401 (any value of a key)
    if isinstance(value, Path):
        value = str(value)
    text = tomli_w.dumps({"v": list(cast("tuple[Any, ...]", value)) if isinstance(value, tuple) else value}).strip()
    return " ".join(text.partition(" = ")[2].split()).replace("[ ", "[").replace(", ]", "]") if " = " in text else "{}"


def _type(annotation: Any, metadata: list[Any]) -> str:  # noqa: ANN401 (a type)
    if get_origin(annotation) is Annotated:
        base, *more = get_args(annotation)
        return _type(base, more)
    choices = next(
        (m.func.entries for m in metadata if isinstance(m, AfterValidator) and isinstance(m.func, Registered)), None
    )
    if choices is not None:
        return f"one of {', '.join(choices)}"
    if get_origin(annotation) is Literal:
        return f"one of {', '.join(get_args(annotation))}"
    if isinstance(annotation, type) and annotation in _NAMES:
        return _NAMES[annotation]
    inner = [part for part in get_args(annotation) if part not in (NoneType, Ellipsis)]
    if get_origin(annotation) is tuple:
        return f"list of {_type(inner[0], [])}"
    if get_origin(annotation) is dict:
        return "table"
    return _type(inner[0], metadata)


def _range(metadata: list[Any]) -> str:
    bounds: list[str] = []
    for one in metadata:
        for sign, kind in (("≥", "ge"), (">", "gt"), ("≤", "le"), ("<", "lt")):
            bound = getattr(one, kind, None) if isinstance(one, annotated_types.BaseMetadata) else None
            if bound is not None:
                bounds.append(f"{sign} {bound}")
    return ", ".join(bounds)


def markdown() -> str:
    """docs/configuration.md."""
    lines = [_HEAD]
    for section in sections():
        lines += [f"## `[{section.name}]`", "", *textwrap.wrap(section.about, _WIDTH), ""]
        for key in section.keys:
            text = f"- `{key.name}` ({_facts(key)}): {key.meaning}"
            lines += textwrap.wrap(text, _WIDTH, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)
        lines += ["", "```toml", section.example(), "```", ""]
    return "\n".join(lines)


def text(name: str) -> str:
    """What `leeway config [SECTION[.KEY]]` prints: all sections, one section, or one key, at 80 columns.

    Raises:
        NotFoundError: there is no such section or key.
    """
    lines: list[str] = []
    for section in sections():
        whole = not name or section.name == name or section.name.startswith(f"{name}.")
        keys = [key for key in section.keys if whole or f"{section.name}.{key.name}" == name]
        if whole:
            lines += [f"[{section.name}]", *textwrap.wrap(section.about, 78), ""]
        for key in keys:
            lines += [f"{section.name}.{key.name}" if not whole else f"  {key.name}"]
            lines += textwrap.wrap(_facts(key), 78, initial_indent="    ", subsequent_indent="    ")
            lines += [*textwrap.wrap(key.meaning, 78, initial_indent="    ", subsequent_indent="    "), ""]
    if not lines:
        raise NotFoundError(f"{name}: no such section or key; `leeway config` lists all")
    return "\n".join(lines).rstrip()


def _facts(key: Key) -> str:
    default = key.default if key.default in ("required", "unset") else f"default {key.default}"
    return "; ".join(part for part in (key.type, key.range, default) if part)


def value_of(configuration: RunConfiguration, name: str) -> str:
    """A section or a key of a configuration as TOML, defaults included; an unset key is empty.

    Raises:
        NotFoundError: there is no such section or key.
    """
    value: Any = configuration.model_dump(mode="json")
    for part in name.split(".") if name else ():
        if not isinstance(value, dict) or part not in value:
            raise NotFoundError(f"{name}: no such section or key; `leeway config` lists all")
        value = cast("dict[str, Any]", value)[part]
    if isinstance(value, dict):
        return tomli_w.dumps(_without_unset(cast("dict[str, Any]", value))).strip()
    return "" if value is None else _toml(value)


def _without_unset(table: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_unset(cast("dict[str, Any]", value)) if isinstance(value, dict) else value
        for key, value in table.items()
        if value is not None
    }
