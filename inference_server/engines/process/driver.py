"""The interface between `ProcessEngine` and an engine with processes of its own, and what such engines share."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from prometheus_client.registry import Collector

from inference_server.engine import GenerationRequest
from leeway.huggingface import check_published, model_outline
from leeway.types import Column, FinishReason, TrajectoryChunk, WeightManifest


@dataclass(frozen=True, slots=True)
class Labelled:
    """Sampled tokens [start, end) of a completion, counted from 0, and the label of the weights that sampled them."""

    start: int
    end: int
    label: int


@dataclass(frozen=True, slots=True)
class SampledEnd:
    """The last item of a completion."""

    finish_reason: FinishReason
    num_tokens: int  # sampled in all
    columns: tuple[Column, ...] = ()  # not yet sent
    labels: Sequence[Labelled] = ()  # of all sampled tokens


class EngineDriver(Protocol):
    """An engine's own interface. Commands (pause, load, resume) come one at a time."""

    @property
    def name(self) -> str:
        """The engine's, for messages."""
        ...

    @property
    def failures(self) -> tuple[type[Exception], ...]:
        """Exceptions of `sample` that mean that the engine has failed."""
        ...

    def sample(
        self, request: GenerationRequest, request_id: str, label: int, max_tokens: int
    ) -> AsyncGenerator[TrajectoryChunk | SampledEnd, None]:
        """Sample one completion; the last item is the SampledEnd. Closing the generator aborts what is left.

        Args:
            request: checked.
            request_id: never used before.
            label: in force when it is admitted; salts the prefix cache.
            max_tokens: what the request asks for, or fewer where the context ends earlier.
        """
        ...

    async def pause(self, *, recompute: bool) -> None:
        """Stop between two steps; running sequences are kept, without their keys and values if `recompute`."""
        ...

    async def load(self, folder: Path, label: int) -> None:
        """Replace every weight by those in a folder's safetensors file; what is sampled from now on has the label."""
        ...

    async def resume(self) -> None:
        """Continue decoding."""
        ...

    async def ended(self) -> str:
        """Wait until the engine's processes have died; returns the reason if it is known, else an empty text."""
        ...

    def kill(self) -> None:
        """Kill the engine's processes; open generators then raise one of `failures`."""
        ...

    async def aclose(self, request_ids: Sequence[str]) -> None:
        """End the open requests and the engine's processes."""
        ...

    def collectors(self) -> Sequence[Collector]:
        """The engine's own metrics."""
        ...


def one_line(error: BaseException) -> str:
    """The message of an error on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def finish_reason(said: str | None, reached_max_tokens: bool) -> FinishReason:
    """The finish reason for the words of vLLM and SGLang."""
    match said:
        case "stop":
            return FinishReason.STOP
        case "length":
            return FinishReason.LENGTH if reached_max_tokens else FinishReason.CONTEXT
        case _:
            return FinishReason.ABORTED


def manifest_check(model_path: Path) -> Callable[[WeightManifest], None]:
    """A check that raises PreconditionError for weights that are not the model's, by name or by shape."""
    outline = model_outline(model_path)

    def check(manifest: WeightManifest) -> None:
        check_published(outline, {entry.name: entry.shape for entry in manifest.tensors})

    return check
