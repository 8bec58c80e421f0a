"""Repairs without which SGLang 0.5.23 does not run on a CPU without AMX.

`python -m inference_server.engines.sglang.cpu_shim PARENT ARGUMENTS` runs `sglang.server` after these repairs, in that
process and in those that it spawns. Never started where there is a GPU.

torchvision   comes with CUDA only; its names must exist to be imported, and text needs none of them.
sgl_kernel    has CUDA kernels only; likewise, none is called without AMX.
host memory   for routing is pinned through CUDA; here it is allocated plainly.
seeds         are taken with `--enable-deterministic-inference` only, whose kernels need CUDA; here always. Each token
              is drawn from a Philox stream of its own, keyed by the request's seed and the token's position.
"""
# SGLang is not installed where types are checked.
# pyright: reportMissingImports=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any, Final, NoReturn

import numpy as np
import torch

from inference_server.engines.sglang import server as sglang_server

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


class _WithSeeds:
    """SGLang's settings, except that seeds are taken."""

    deterministic = SimpleNamespace(enable_deterministic_inference=True)

    def __init__(self, settings: Any) -> None:  # noqa: ANN401
        self._settings = settings

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._settings, name)


def draw(logprobs: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Sample a token for each row, the same one for the same seed and position.

    Args:
        logprobs: of the vocabulary. [n, V]
        seeds: as the requests gave them. [n] int64
        positions: of the tokens before those that are drawn. [n]

    Returns:
        Token ids. [n, 1]
    """
    keys = np.stack([seeds.numpy().astype(np.int64).view(np.uint64), positions.numpy().astype(np.uint64)], axis=1)
    uniform = [np.random.Generator(np.random.Philox(key=key)).random() for key in keys]
    cumulative = logprobs.double().exp().cumsum(-1)
    threshold = torch.tensor(uniform, dtype=torch.float64)[:, None] * cumulative[:, -1:]
    # The first whose sum is above; never one of probability 0.
    return torch.searchsorted(cumulative, threshold, right=True).clamp_(max=logprobs.shape[1] - 1)


def install() -> None:
    """Repair this process; before anything of SGLang is imported."""
    from transformers.utils.import_utils import is_torchvision_available

    is_torchvision_available()  # transformers can do without, and remembers that it has to
    for name in _ABSENT:
        sys.modules[name] = _Absent(name)
    from sglang.srt.mem_cache.pool_host import common

    common.ALLOC_MEMORY_FUNCS["cpu"] = _allocate
    from sglang.srt.layers import sampler
    from sglang.srt.sampling import sampling_batch_info

    sampler.multinomial_with_seed = draw
    settings = sampling_batch_info.get_exec
    sampling_batch_info.get_exec = lambda: _WithSeeds(settings())


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
