"""What a model's files say of requests and weights, for an engine that loads the model in another process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from leeway.config import ProcessEngineOptions
from leeway.errors import ConfigError
from leeway.huggingface import check_published, model_outline
from leeway.types import ModelSignature, WeightManifest


def check_context_length(options: ProcessEngineOptions, signature: ModelSignature) -> None:
    """Refuse a context that the model was not made for.

    Raises:
        ConfigError: it is longer than the model's.
    """
    if options.context_length is not None and options.context_length > signature.context_length:
        raise ConfigError(
            f"context_length {options.context_length} is more than the model's {signature.context_length}; "
            "lower it or leave it unset"
        )


def manifest_check(model_path: Path) -> Callable[[WeightManifest], None]:
    """A check that raises PreconditionError for weights that are not the model's, by name or by shape."""
    outline = model_outline(model_path)

    def check(manifest: WeightManifest) -> None:
        check_published(outline, {entry.name: entry.shape for entry in manifest.tensors})

    return check
