"""User functions named in the configuration as `module:function`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
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
    """Import `module:function`, looking in `python_path` first.

    Raises:
        ConfigError: the reference is malformed, the module cannot be imported, or has no such function.
    """
    module_name, function_name = split_reference(reference)
    if str(python_path) not in sys.path:
        sys.path.insert(0, str(python_path))
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"{reference}: cannot import {module_name} from {python_path}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(f"{reference}: {module_name} has no function {function_name}")
    return function
