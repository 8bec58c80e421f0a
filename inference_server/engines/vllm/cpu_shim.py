"""Routing and weight reload for vLLM 0.32 on a CPU. Never loaded where vLLM runs on another platform.

Routing: vLLM records routed experts through its Model Runner V2, which needs a CPU backend of triton that does not
exist. Here the first runner drives vLLM's own recorder: begin a step, take the snapshot after the forward, hand it out
with the sampled tokens. vLLM checks its configuration again in the engine core, so the configuration itself has to say
that this runner will do.

Reload: vLLM packs a CPU's expert weights once, after the first load, and reads the packed copy from then on; a reload
replaces the originals only. `prepack_experts` packs again.
"""
# vLLM is not installed where types are checked.
# pyright: reportMissingImports=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUntypedBaseClass=false, reportUnknownParameterType=false

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.distributed.aux_output_connector.worker import get_aux_output_connector
from vllm.model_executor.layers.fused_moe.layer import MoERunner
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

WORKER_CLASS: Final = "inference_server.engines.vllm.cpu_shim.RoutingCPUWorker"


class RoutingConfig(VllmConfig):
    """A configuration with routed experts that is not refused for its runner."""

    def _verify_aux_output_compatibility(self) -> None:
        pass


def with_routing(config: VllmConfig) -> VllmConfig:
    """Turn on routed experts in a configuration whose worker is a RoutingCPUWorker."""
    config.__class__ = RoutingConfig
    config.aux_output_config.enable_return_routed_experts = True
    return config


class RoutingCPUWorker(CPUWorker):
    """A CPU worker whose runner records routed experts."""

    def init_device(self) -> None:
        super().init_device()
        self.model_runner = RoutingCPUModelRunner(self.vllm_config, torch.device("cpu"))


@dataclass(frozen=True, slots=True)
class _Batch:
    """The part of a step's batch that the recorder reads."""

    req_ids: list[str]
    query_start_loc_np: Any  # [requests + 1]
    num_computed_tokens_np: Any  # [requests]


class RoutingCPUModelRunner(CPUModelRunner):
    """A CPU runner that drives vLLM's recorder of routed experts."""

    _recorder: Any = None
    _pending: Any = None

    def initialize_kv_cache(self, kv_cache_config: Any, is_profiling: bool = False, **settings: Any) -> None:  # noqa: ANN401
        super().initialize_kv_cache(kv_cache_config, is_profiling, **settings)
        if not is_profiling:
            self._recorder = get_aux_output_connector(self.get_model(), self.vllm_config, kv_cache_config)

    def execute_model(self, scheduler_output: Any, *arguments: Any, **settings: Any) -> Any:  # noqa: ANN401
        self._recorder.begin_step(scheduler_output.aux_output_connector_metadata)
        result = super().execute_model(scheduler_output, *arguments, **settings)
        self._pending = None
        if scheduler_output.total_num_scheduled_tokens:
            ids = list(self.input_batch.req_ids)
            scheduled = [scheduler_output.num_scheduled_tokens[request_id] for request_id in ids]
            ends = np.cumsum([0, *scheduled])
            computed = self.input_batch.num_computed_tokens_cpu[: len(ids)].copy()
            self._pending = self._recorder.prepare_output(_Batch(ids, ends, computed))
        return result

    def sample_tokens(self, *arguments: Any, **settings: Any) -> Any:  # noqa: ANN401
        output = super().sample_tokens(*arguments, **settings)
        pending, self._pending = self._pending, None
        if pending is not None and output is not None:
            sampled = {
                request_id: len(output.sampled_token_ids[index]) for request_id, index in output.req_id_to_index.items()
            }
            counts = np.array([sampled.get(request_id, 0) for request_id in pending.request_ids])
            pending.enqueue_cpu_copy(counts, np.zeros_like(counts))
            output.aux_output_connector_output = pending.process_output()
        return output


def prepack_experts(model: torch.nn.Module) -> None:
    """Pack the expert weights again, after a reload."""
    for module in cast("Iterable[Any]", model.modules()):
        if isinstance(module, MoERunner):
            experts = module._quant_method.moe_kernel.fused_experts
            experts.process_weights_after_loading(module.routed_experts)
