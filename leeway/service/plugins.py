"""User functions named in the configuration as `module:function`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from leeway.errors import ConfigError


def split_reference(reference: str) -> tuple[str, str]:
    """The names of module and function in `module:function`.

    Raises:
        ConfigError: the reference does not have that form.
    """
    module_name, _, function_name = reference.partition(":")
    if not module_name or not function_name:
        raise ConfigError(f"{reference!r} does not name a function; write module:function")
    return module_name, function_name


def load_function(reference: str, python_path: Path) -> Callable[..., Any]:
    """Import `module:function` from `python_path` or from what is installed.

    `python_path` is searched last: files such as learner.py in a user's folder must not hide modules of Leeway or of
    the libraries that it imports later.

    Raises:
        ConfigError: the reference is malformed, the module cannot be imported or is hidden by another one of its name,
            or it has no such function.
    """
    module_name, function_name = split_reference(reference)
    if str(python_path) not in sys.path:
        sys.path.append(str(python_path))
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"{reference}: cannot import {module_name} from {python_path}: {error}") from error
    _check_not_hidden(reference, python_path)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(f"{reference}: {module_name} has no function {function_name}")
    return function


def _check_not_hidden(reference: str, python_path: Path) -> None:
    name = reference.partition(":")[0].partition(".")[0]
    if not ((python_path / name).is_dir() or (python_path / f"{name}.py").is_file()):
        return
    imported = _places(sys.modules[name])
    if not any(place.is_relative_to(python_path.resolve()) for place in imported):
        first = imported[0] if imported else "a built-in module"
        raise ConfigError(
            f"{reference}: {python_path} has a module {name}, but {first} of the same name comes first; rename yours"
        )


def _places(module: ModuleType) -> list[Path]:
    """The folders of a package, or the file of a module."""
    places = list(getattr(module, "__path__", [])) or [getattr(module, "__file__", None)]
    return [Path(place).resolve() for place in places if place is not None]
