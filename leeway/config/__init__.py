"""The whole configuration of a run. Needs no torch.

    file, --set ── load_document ──> Document ── one model per section ──> RunConfiguration

document           how a file is read, overridden and written; what a refusal says
run, network, replay_buffer, inference_server, engines, learner, losses     the sections, with every key and default
algorithms         the policy losses by name
"""

from leeway.config.document import Address, Document, Options, load_document, section, write_document
from leeway.config.engines import (
    ENGINES,
    ArithmeticEngineOptions,
    EngineOptions,
    ModelEngineOptions,
    ProcessEngineOptions,
    SglangEngineOptions,
    TransformersEngineOptions,
    VllmEngineOptions,
)
from leeway.config.inference_server import InferenceServerOptions, RewardOptions, WorkerOptions, WriterOptions
from leeway.config.learner import FleetOptions, LearnerOptions, LoraOptions, TrainingOptions
from leeway.config.losses import LossOptions, check_recorded_topk
from leeway.config.network import MetricsOptions, NetworkOptions
from leeway.config.replay_buffer import ReplayBufferOptions, read_options
from leeway.config.run import EvaluationOptions, ModelOptions, RunOptions, SamplingOptions, TaskOptions

__all__ = [
    "ENGINES",
    "Address",
    "ArithmeticEngineOptions",
    "Document",
    "EngineOptions",
    "EvaluationOptions",
    "FleetOptions",
    "InferenceServerOptions",
    "LearnerOptions",
    "LoraOptions",
    "LossOptions",
    "MetricsOptions",
    "ModelEngineOptions",
    "ModelOptions",
    "NetworkOptions",
    "Options",
    "ProcessEngineOptions",
    "ReplayBufferOptions",
    "RewardOptions",
    "RunOptions",
    "SamplingOptions",
    "SglangEngineOptions",
    "TaskOptions",
    "TrainingOptions",
    "TransformersEngineOptions",
    "VllmEngineOptions",
    "WorkerOptions",
    "WriterOptions",
    "check_recorded_topk",
    "load_document",
    "read_options",
    "section",
    "write_document",
]
