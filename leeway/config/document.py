"""One TOML file configures a run: how it is read, overridden, checked key by key, and written again.

    file ── load_document ──> Document ── section(document, "run", RunOptions) ──> frozen options
                 ▲
        --set key.path=value (TOML syntax; a bare word is a string)

A refusal names the file, the key, what is wrong, and the value that was given. Relative paths start at the
configuration file's own directory, so that a run starts the same from any working directory.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo

from leeway.errors import ConfigError

SECTIONS = (
    "run",
    "model",
    "task",
    "sampling",
    "network",
    "metrics",
    "evaluation",
    "replay_buffer",
    "inference_server",
    "learner",
)


class Options(BaseModel):
    """A section: immutable, and nothing but the named keys. Numbers are finite unless a field says otherwise."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _in_config_directory(value: object, info: ValidationInfo) -> object:
    """A path as given; relative ones start at the configuration file's directory. Links are not followed."""
    if not isinstance(value, (str, Path)):
        return value
    context: Mapping[str, Path] = info.context or {}
    return (context.get("directory", Path()) / Path(value).expanduser()).absolute()


def _resolved(value: object, info: ValidationInfo) -> object:
    path = _in_config_directory(value, info)
    return path.resolve() if isinstance(path, Path) else path


ConfigPath = Annotated[Path, BeforeValidator(_resolved)]
"""A file or folder; a relative path starts at the configuration file's directory."""

ConfigProgram = Annotated[Path, BeforeValidator(_in_config_directory)]
"""A program. Links are kept: the interpreter of a virtual environment finds its libraries by its own path."""

Address = Annotated[str, Field(pattern=r"^[^:\s]+:\d{1,5}$")]
"""host:port"""


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed configuration file with its overrides applied."""

    path: Path
    values: Mapping[str, Any]


OptionsT = TypeVar("OptionsT", bound=Options)


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
    unknown = [name for name in values if name not in SECTIONS]
    if unknown:
        raise ConfigError(f"{path}: unknown section [{unknown[0]}]; known are {', '.join(SECTIONS)}")
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


def section(document: Document, name: str, options: type[OptionsT], **defaults: object) -> OptionsT:
    """Validate one section; `defaults` stand in for keys that it does not set.

    Raises:
        ConfigError: naming file, key, what is wrong with it and what was given.
    """
    given: Any = document.values.get(name, {})
    if defaults and isinstance(given, dict):
        given = {**defaults, **cast("dict[str, Any]", given)}
    try:
        return options.model_validate(given, context={"directory": document.path.parent})
    except ValidationError as error:
        raise ConfigError(_explain(document.path, name, error)) from error


def _explain(path: Path, name: str, error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join([name, *(str(part) for part in first["loc"])])
    message = first["msg"]
    if first["type"] == "extra_forbidden":
        message = "unknown key; remove it or correct its spelling"
    elif first["type"] == "missing":
        message = "required, but not set"
    elif first["type"] == "value_error":
        message = first["msg"].removeprefix("Value error, ")
    else:
        message = f"{message[0].lower()}{message[1:]}, but is {first['input']!r}"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{path}: {key}: {message}{more}"


def write_document(path: Path, sections: Mapping[str, Options]) -> None:
    """Save options as TOML that `load_document` reads back; unset optional keys are left out."""
    values = {name: options.model_dump(mode="json", exclude_none=True) for name, options in sections.items()}
    path.write_text(tomli_w.dumps(values), encoding="utf-8")
