"""The extension of vLLM's worker processes: it loads a snapshot's file into the model that decodes.

vLLM mixes `WeightLoader` into its worker class (`worker_extension_cls`), and `collective_rpc` calls it by name. The
caller has paused decoding; a failure leaves a mixture, and the caller must not let the engine decode again.
"""
# vLLM is not installed where types are checked.
# pyright: reportMissingImports=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open


class WeightLoader:
    """Mixed into a worker; `model_runner` and `vllm_config` are the worker's."""

    model_runner: Any
    vllm_config: Any

    def leeway_end_with(self, process_id: int) -> None:
        """End vLLM when a process ends in any way: its engine core would otherwise outlive a killed server."""
        guarded = os.pidfd_open(process_id)
        threading.Thread(target=_end_after, args=(guarded, os.getppid()), name="end with server", daemon=True).start()

    def leeway_load_weights(self, file: str) -> None:
        """Replace every weight by what a safetensors file holds under the names of a checkpoint."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
        from vllm.platforms import current_platform

        model = self.model_runner.get_model()
        # Kernels keep weights in layouts of their own: vLLM repeats a layer's layout when it has all of it, and copies
        # the result to where captured graphs expect it.
        with torch.no_grad(), set_current_vllm_config(self.vllm_config), disable_mtp_completeness_check():
            initialize_layerwise_reload(model)
            model.load_weights(_tensors(Path(file)))
            finalize_layerwise_reload(model, self.vllm_config.model_config)
            if current_platform.is_cpu():
                from inference_server.engines.vllm.cpu_shim import prepack_experts

                prepack_experts(model)
        torch.accelerator.synchronize()


def _end_after(guarded: int, engine_core: int) -> None:
    select.select([guarded], [], [])  # readable when the process has ended; no deadline: it is hoped to live long
    os.kill(engine_core, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (not a dict)
            yield name, tensors.get_tensor(name)
