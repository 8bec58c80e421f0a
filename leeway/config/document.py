"""One TOML file configures a run: how it is read and overridden, and what its values are made of.

    file ── load_document ──> Document ── read_configuration ──> RunConfiguration
                 ▲
        --set section.key=value (TOML syntax; a bare word is a string)

A refusal names the file, the key, what is wrong, and the value that was given. Relative paths start at the
configuration file's own directory, so that a run starts the same from any working directory.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo

from leeway.errors import ConfigError


class Options(BaseModel):
    """A section: immutable, and nothing but the named keys. Numbers are finite unless a field says otherwise."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _in_config_directory(value: object, info: ValidationInfo) -> object:
    """A path as given; relative ones start at the configuration file's directory. Links are not followed."""
    if not isinstance(value, (str, Path)):
        return value
    context: Mapping[str, Path] = info.context or {}
    return (context.get("file", Path()).parent / Path(value).expanduser()).absolute()


def _resolved(value: object, info: ValidationInfo) -> object:
    path = _in_config_directory(value, info)
    return path.resolve() if isinstance(path, Path) else path


ConfigPath = Annotated[Path, BeforeValidator(_resolved)]
"""A file or folder; a relative path starts at the configuration file's directory."""

ConfigProgram = Annotated[Path, BeforeValidator(_in_config_directory)]
"""A program. Links are kept: the interpreter of a virtual environment finds its libraries by its own path."""


@dataclass(frozen=True, slots=True)
class Registered:
    """Validates the name of an entry of a registry: `Annotated[str, AfterValidator(Registered("engine", ENGINES))]`."""

    kind: str
    entries: Collection[str]

    def __call__(self, name: str) -> str:
        if name not in self.entries:
            raise ValueError(f"there is no {self.kind} {name!r}; choose one of {', '.join(self.entries)}")
        return name


Address = Annotated[str, Field(pattern=r"^[^:\s]+:\d{1,5}$")]
"""host:port"""


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed configuration file with its overrides applied."""

    path: Path
    values: Mapping[str, Any]


def load_document(path: Path, overrides: Sequence[str] = ()) -> Document:
    """Read a TOML file and apply `section.key=value` overrides.

    Raises:
        ConfigError: the file cannot be read or parsed, or an override is malformed.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror}; check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    for override in overrides:
        _apply_override(values, override)
    return Document(path.resolve(), values)


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise ConfigError(f"--set {override}: write section.key=value, for example run.steps=10")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    table: dict[str, Any] = values
    for part in parts[:-1]:
        inner: Any = table.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override}: {part} is a value, not a section")
        table = cast("dict[str, Any]", inner)
    table[parts[-1]] = value


def explain(path: Path, error: ValidationError) -> str:
    """One line for what is wrong with a document: the first unknown key, else the first value that cannot be used."""
    errors = error.errors(include_url=False)
    first = min(errors, key=lambda one: one["type"] != "extra_forbidden")
    key = ".".join(map(str, first["loc"]))
    message = first["msg"]
    if first["type"] == "extra_forbidden":
        kind = "key" if len(first["loc"]) > 1 else "section"
        message = f"unknown {kind}; remove it or correct its spelling (`leeway config` lists all)"
    elif first["type"] == "missing":
        message = "required, but not set"
    elif first["type"] == "value_error":
        message = message.removeprefix("Value error, ")
    else:
        message = f"{message[0].lower()}{message[1:]}, but is {first['input']!r}"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"{path}: {key}: {message}{more}"
