"""Weights and optimizer on disk: `torch.distributed.checkpoint` with its safetensors storage, scalars as JSON.

directory/weights/    parameters and buffers by module name, in the learner's precision
directory/optimizer/  AdamW's moments by name
directory/trainer.json  format, model digest, steps taken
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load  # pyright: ignore[reportUnknownVariableType]
from torch.distributed.checkpoint.state_dict_saver import (
    async_save,  # pyright: ignore[reportUnknownVariableType]
    save,  # pyright: ignore[reportUnknownVariableType]
)

from leeway.errors import CorruptDataError
from leeway.service.durable import replace_file

FORMAT = 1
_SCALARS = "trainer.json"


@dataclass(frozen=True, slots=True)
class TrainerScalars:
    """A trainer's state besides its tensors."""

    format: int
    model_digest: str  # hex
    num_steps: int
    mismatch_total: float = 0.0  # of divergences at staleness zero, older steps counting less
    mismatch_tokens: float = 0.0


def begin_save_tensors(
    directory: Path, tensors: dict[str, Tensor], group: ProcessGroup | None = None
) -> Callable[[], None]:
    """Copy named tensors, and write them into a directory while the originals may change.

    Args:
        directory: where to; of one kind of tensors.
        tensors: by name; sharded ones are written by each rank for itself.
        group: of all ranks, in use for nothing else; None in a single process.

    Returns:
        Waits until every rank has written, and raises what went wrong.
    """
    directory.mkdir(exist_ok=True)
    if group is not None:
        writer = HuggingFaceStorageWriter(str(directory), save_distributed=True)
        saving = cast("Future[None]", async_save(tensors, storage_writer=writer, process_group=group))
        return saving.result
    _expect_single_process()
    copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
    executor = ThreadPoolExecutor(1, thread_name_prefix="save")
    writing = executor.submit(_save_alone, directory, copies)
    executor.shutdown(wait=False)
    return writing.result


def _save_alone(directory: Path, tensors: dict[str, Tensor]) -> None:
    save(tensors, storage_writer=HuggingFaceStorageWriter(str(directory)), no_dist=True)


def load_tensors(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Fill named tensors in place; each rank reads what its shards need, however many ranks wrote.

    Raises:
        CorruptDataError: the directory does not hold these tensors.
    """
    if not directory.is_dir():
        raise CorruptDataError(f"{directory} is missing from the checkpoint; use an older one")
    try:
        _expect_single_process()
        load(tensors, storage_reader=HuggingFaceStorageReader(str(directory)), no_dist=True)
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise CorruptDataError(f"{directory} does not hold this trainer's tensors: {_one_line(cause)}") from error


def save_scalars(directory: Path, scalars: TrainerScalars) -> None:
    """Write the scalars and make them durable."""
    replace_file(directory / _SCALARS, json.dumps(asdict(scalars), indent=2))


def load_scalars(directory: Path) -> TrainerScalars:
    """Read the scalars.

    Raises:
        CorruptDataError: there are none, or not these.
    """
    path = directory / _SCALARS
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        scalars = TrainerScalars(**content)
    except (OSError, ValueError, TypeError) as error:
        raise CorruptDataError(f"{path} cannot be read: {error}; use an older checkpoint") from error
    if scalars.format != FORMAT:
        raise CorruptDataError(f"{path} has format {scalars.format} where {FORMAT} can be read")
    return scalars


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _expect_single_process() -> None:
    """Saving without a process group is meant; torch warns about it each time.

    Filters belong to the process, so a filter for a while would not do: files are written in threads.
    """
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
