"""A snapshot as a safetensors file, by which weights reach an engine in another process."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Final

from leeway.codec.dtypes import element_size_bytes
from leeway.errors import PreconditionError
from leeway.types import WeightSnapshot

FILE_NAME: Final = "model.safetensors"
_PREFIX: Final = "leeway-weights-"
_DTYPE: Final = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
_ALIGNMENT_BYTES: Final = 8


@contextlib.contextmanager
def staged_weights(snapshot: WeightSnapshot, directory: Path) -> Generator[Path, None, None]:
    """A folder, readable by this user only, that holds the snapshot as `model.safetensors` for the block.

    Args:
        snapshot: verified weights.
        directory: where the folder is made; a memory file system saves a trip to the disk.

    Raises:
        PreconditionError: it cannot be written there.
    """
    try:
        folder, lock = _locked_folder(directory)
    except OSError as error:
        raise PreconditionError(
            f"weights cannot be staged in {directory}: {error.strerror}; set the engine's staging_directory"
        ) from error
    try:
        write_safetensors(snapshot, folder / FILE_NAME)
        yield folder
    except OSError as error:
        raise PreconditionError(
            f"{snapshot.manifest.size_bytes} bytes of weights cannot be staged in {directory}: {error.strerror}; "
            "set the engine's staging_directory to a place with room"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def remove_abandoned(directory: Path) -> None:
    """Remove the folders of servers that were killed: those that no process has locked."""
    for folder in directory.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # locked, another user's, or gone already
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(lock)


def _locked_folder(directory: Path) -> tuple[Path, int]:
    """A new folder, and the open file that locks it while this process lives.

    Before it is locked, another server's start may take it for abandoned: then another one is made.
    """
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=directory))
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():
                return folder, lock
            os.close(lock)


def write_safetensors(snapshot: WeightSnapshot, file: Path) -> None:
    """Write weights as they came, without a copy: header size [8], header as JSON, the tensors' bytes.

    Raises:
        PreconditionError: a tensor's element type is none of a weight's.
    """
    tensors = list(zip(snapshot.manifest.tensors, snapshot.buffers, strict=True))
    unknown = [entry for entry, _ in tensors if entry.dtype not in _DTYPE]
    if unknown:
        raise PreconditionError(f"{unknown[0].name} is {unknown[0].dtype}; weights are {', '.join(_DTYPE)}")
    tensors.sort(key=lambda tensor: -element_size_bytes(tensor[0].dtype))  # each is aligned to its element
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry, _ in tensors:
        end = offset + entry.size_bytes
        header[entry.name] = {"dtype": _DTYPE[entry.dtype], "shape": entry.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    with file.open("xb") as target:
        target.write(len(text).to_bytes(8, "little"))
        target.write(text)
        for _, buffer in tensors:
            target.write(buffer)
