"""What SGLang 0.5.23 needs to run on a CPU without AMX.

`python -m inference_server.engines.sglang_cpu_shim ARGUMENTS` runs `sglang_server` after three repairs, in that process
and in those that it spawns. Never started where there is a GPU.

torchvision   comes with CUDA only; its names must exist to be imported, and text needs none of them.
sgl_kernel    has CUDA kernels only; likewise, none is called without AMX.
host memory   for routing is pinned through CUDA; here it is allocated plainly.
"""
# SGLang is not installed where types are checked.
# pyright: reportMissingImports=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Final, NoReturn

from inference_server.engines import sglang_server

_ABSENT: Final = (
    "sgl_kernel",
    "torchvision",
    "torchvision.io",
    "torchvision.transforms",
    "torchvision.transforms.functional",
    "torchvision.transforms.v2",
    "torchvision.transforms.v2.functional",
)


class _Absent(ModuleType):
    """A module in which every name exists, and fails when it is called."""

    __version__ = "0"

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None, is_package=True)
        self.__path__ = []

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*_: Any, **__: Any) -> NoReturn:  # noqa: ANN401
            raise NotImplementedError(f"{self.__name__}.{name} does not exist on this CPU")

        missing.__name__ = name
        return missing


def install() -> None:
    """Repair this process; before anything of SGLang is imported."""
    from transformers.utils.import_utils import is_torchvision_available

    is_torchvision_available()  # transformers can do without, and remembers that it has to
    for name in _ABSENT:
        sys.modules[name] = _Absent(name)
    from sglang.srt.mem_cache.pool_host import common

    common.ALLOC_MEMORY_FUNCS["cpu"] = _allocate


def _allocate(
    dims: Any,  # noqa: ANN401
    dtype: Any,  # noqa: ANN401
    device: Any,  # noqa: ANN401
    pin_memory: bool,
    allocator: Any,  # noqa: ANN401
    registration_granularity_bytes: int | None = None,
) -> Any:  # noqa: ANN401
    return allocator.allocate(dims, dtype=dtype, device=device)


if __name__ in ("__main__", "__mp_main__"):  # the second is how a spawned process sees it
    install()
if __name__ == "__main__":
    sglang_server.main()
