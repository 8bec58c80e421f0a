"""The whole configuration of a run. Needs no torch.

    file, --set ──> Document ── every key, every section ──> RunConfiguration ── every rule across sections ──> accepted
                                                                                                                  │
                       `leeway run`, the services that need them, their --check ── open what the file names <─────┘

configuration      RunConfiguration and `read_configuration`, which checks all that can be checked by reading
rules              what shows only between two sections, as pure functions
references         what shows only when something is opened: model, tasks, reward function
reference          every key in words, for docs/configuration.md and `leeway config`
document           how a file is read and overridden; what a refusal says
run, network, replay_buffer, inference_server, engines, learner, losses     the sections, with every key and default
algorithms, engines.ENGINES, leeway.weights.transports                      what a configuration may name
"""

from leeway.config.configuration import RunConfiguration, load_configuration, read_configuration
from leeway.config.document import Document, Options, load_document
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
from leeway.config.losses import LossOptions
from leeway.config.network import MetricsOptions, NetworkOptions
from leeway.config.replay_buffer import ReplayBufferOptions
from leeway.config.run import EvaluationOptions, ModelOptions, RunOptions, SamplingOptions, TaskOptions

__all__ = [
    "ENGINES",
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
    "RunConfiguration",
    "RunOptions",
    "SamplingOptions",
    "SglangEngineOptions",
    "TaskOptions",
    "TrainingOptions",
    "TransformersEngineOptions",
    "VllmEngineOptions",
    "WorkerOptions",
    "WriterOptions",
    "load_configuration",
    "load_document",
    "read_configuration",
]
