"""One inference server, put together from a configuration file.

    weight receiver ──> served policy ──> engine <── InferenceService (others may generate and push, too)
                              │             ▲
                              └── rollout worker ──> replay buffer

All of it ends together: when the run has finished, when a stop is asked for, or with the first error that no part can
handle itself.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from inference_server.engine import Engine, EngineProcess
from inference_server.engines.arithmetic import ArithmeticEngine
from inference_server.engines.remote import RemoteEngine
from inference_server.options import InferenceServerOptions
from inference_server.rollout.reward import RewardRunner
from inference_server.rollout.text import HuggingFaceTokenizer, Tokenizer
from inference_server.rollout.worker import RolloutWorker
from inference_server.served_policy import ServedPolicy
from inference_server.service import SERVICE_NAME, add_inference_service
from inference_server.weights.receiver import WeightReceiver
from leeway.arithmetic import ArithmeticTokenizer
from leeway.config import (
    Document,
    MetricsOptions,
    ModelOptions,
    NetworkOptions,
    RunOptions,
    SamplingOptions,
    TaskOptions,
    load_document,
    section,
)
from leeway.errors import ConfigError, LeewayError
from leeway.replay_client import ReplayClient
from leeway.rpc import Security, cancel_and_wait, start_server
from leeway.service.metrics import InferenceServerMetrics, serve_metrics
from leeway.service.plugins import load_function
from leeway.service.ports import free_port
from leeway.service.process import EXIT_OK, report_error, serve, service_parser, tell_run_finished, unless_stopped
from leeway.tasks import load_tasks
from leeway.weights.transports import BroadcastLibrary, broadcast_library

log = logging.getLogger("inference_server")


@dataclass(frozen=True, slots=True)
class Joining:
    """A server that the configuration does not list: it joins a run on its way.

    Args:
        name: unique in the run.
        address: where it listens; None takes a free port of this host.
        metrics_port: of its metrics; 0 takes a free one.
    """

    name: str
    address: str | None = None
    metrics_port: int = 0


class InferenceServerProcess:
    """What the configuration says, for the server with one index, or for one that joins beside those.

    Args:
        document: the run's configuration.
        index: which entry of network.inference_servers and metrics.inference_servers this is.
        backend: address of a foreign InferenceService that samples, in place of the configured one.
        joining: set for a server that the configuration does not list; the index then means nothing.

    Raises:
        ConfigError: a section cannot be used, there is no server with that index, or a joining one takes such a name.
    """

    def __init__(
        self, document: Document, index: int, backend: str | None = None, joining: Joining | None = None
    ) -> None:
        self.run = section(document, "run", RunOptions)
        self.model = section(document, "model", ModelOptions)
        self.task = section(document, "task", TaskOptions)
        self.sampling = section(document, "sampling", SamplingOptions)
        self.network = section(document, "network", NetworkOptions)
        self.metrics = section(document, "metrics", MetricsOptions)
        self.options = section(document, "inference_server", InferenceServerOptions)
        self.security = Security.from_files(
            self.network.certificate, self.network.key, self.network.authority, insecure=self.network.insecure
        )
        self.broadcasts: BroadcastLibrary | None = broadcast_library(self.network)
        if joining is None:
            self._take_place(document, index, backend)
        else:
            self._join(document, joining, backend)

    def _take_place(self, document: Document, index: int, backend: str | None) -> None:
        backends = self.options.backends
        for key, entries in (
            *([("inference_server.backends", backends)] if backends else []),
            ("network.inference_servers", self.network.inference_servers),
            ("metrics.inference_servers", self.metrics.inference_servers),
        ):
            if not 0 <= index < len(entries):
                raise ConfigError(f"{document.path}: {key} has {len(entries)} entries, none for --index {index}")
        self.server_id = f"server-{index}"
        self.address = self.network.inference_servers[index]
        self.metrics_port = self.metrics.inference_servers[index]
        self.engine = self.options.engine_of(index)
        self.backend = backend or (backends[index] if backends else None)

    def _join(self, document: Document, joining: Joining, backend: str | None) -> None:
        if joining.name in (f"server-{index}" for index in range(len(self.network.inference_servers))):
            raise ConfigError(
                f"{document.path}: {joining.name} is one of the configured servers; give --join another name, or start "
                "that one with --index"
            )
        self.server_id = joining.name
        self.address = joining.address or f"127.0.0.1:{free_port('127.0.0.1')}"
        self.metrics_port = joining.metrics_port or free_port(self.metrics.host)
        self.engine = self.options.engine
        self.backend = backend

    async def main(self, stop: asyncio.Event) -> None:
        """Serve and feed the run until it has finished or `stop` is set."""
        registry = CollectorRegistry()
        metrics = InferenceServerMetrics(registry)
        tasks = load_tasks(self.task, self.run.seed)
        reward = RewardRunner(
            load_function(self.task.reward, self.task.python_path),
            self.task.reward,
            self.options.reward_limits(),
            metrics,
        )
        tokenizer = self._make_tokenizer()
        serve_metrics(registry, self.metrics.host, self.metrics_port)
        engine = await unless_stopped(stop, self._make_engine())
        if engine is None:
            return
        if isinstance(engine, EngineProcess):
            for collector in engine.collectors():
                registry.register(collector)
        policy = ServedPolicy(engine, self.run.name)
        client = ReplayClient(self.network.replay_buffer, self.run.name, self.security)
        receiver = WeightReceiver(
            policy=policy,
            signature=engine.info().signature,
            run=self.run.name,
            server_id=self.server_id,
            address=self.network.policy,
            security=self.security,
            allow_local=self.network.weights in ("auto", "zmq"),
            broadcasts=self.broadcasts,
            take_deltas=self.options.take_deltas,
            fetch_timeout_seconds=self.options.fetch_timeout_seconds,
            metrics=metrics,
        )
        worker = RolloutWorker(
            engine=engine,
            policy=policy,
            client=client,
            server_id=self.server_id,
            tasks=tasks,
            tokenizer=tokenizer,
            reward=reward,
            limits=self.options.worker_limits(),
            writer_limits=self.options.writer_limits(),
            metrics=metrics,
        )
        try:
            await self._serve(engine, policy, receiver, worker, stop)
        finally:
            await engine.aclose()
            await client.aclose()
        if not stop.is_set():
            tell_run_finished()
        log.info("%s has ended", self.server_id)

    async def _serve(
        self,
        engine: Engine,
        policy: ServedPolicy,
        receiver: WeightReceiver,
        worker: RolloutWorker,
        stop: asyncio.Event,
    ) -> None:
        server = None
        if self.backend is None:
            add_service = add_inference_service(engine, policy)
            server = await start_server(self.address, add_service, [SERVICE_NAME], self.security)
            log.info("serving %s on %s as %s", engine.info().engine, self.address, self.server_id)
        try:
            async with asyncio.TaskGroup() as group:
                services = [group.create_task(receiver.run(), name="weight receiver")]
                if isinstance(engine, EngineProcess):
                    services.append(group.create_task(engine.watch(), name="engine watch"))
                await worker.run(stop)
                for service in services:
                    await cancel_and_wait(service)
        finally:
            if server is not None:
                await server.stop(grace_seconds=1.0)

    async def _make_engine(self) -> Engine:
        if self.backend is not None:
            return await RemoteEngine.connect(
                self.backend, self.security, timeout_seconds=self.options.trajectory_timeout_seconds
            )
        if self.engine == "arithmetic":
            return ArithmeticEngine(self.options.arithmetic)
        if self.engine == "vllm":
            _require_module("vllm")
            from inference_server.engines.vllm import engine as vllm_engine

            return await vllm_engine.start(self.model.directory, self.options.vllm)
        if self.engine == "sglang":
            _require_module("sglang")
            from inference_server.engines.sglang import engine as sglang_engine

            return await sglang_engine.start(self.model.directory, self.options.sglang)
        from inference_server.engines.transformers.engine import TransformersEngine

        return await asyncio.to_thread(TransformersEngine, self.model.directory, self.options.transformers)

    def _make_tokenizer(self) -> Tokenizer:
        if self.engine == "arithmetic":
            return ArithmeticTokenizer()
        return HuggingFaceTokenizer(self.model.directory, chat=self.task.chat)


def _require_module(name: str) -> None:
    """Say where an engine's library belongs.

    Raises:
        ConfigError: this interpreter does not have it.
    """
    if importlib.util.find_spec(name) is None:
        raise ConfigError(
            f"inference_server.engine: {sys.executable} has no {name}; set inference_server.{name}.python to the "
            f"interpreter of its environment (`make engine-env ENGINE={name}` builds one)"
        )


def _add_place(parser: ArgumentParser) -> None:
    """Which server of the run this is."""
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--index", type=int, default=0, metavar="I", help="which of network.inference_servers this is")
    place.add_argument("--join", metavar="NAME", help="a server beside those, which joins the run under this name")
    parser.add_argument(
        "--address", metavar="HOST:PORT", help="where --join listens (default: a free port of this host)"
    )
    parser.add_argument(
        "--metrics-port", type=int, default=0, metavar="PORT", help="metrics of --join (default: a free port)"
    )


def _joining(arguments: Namespace) -> Joining | None:
    """Raises ConfigError: an option of --join without it."""
    if arguments.join:
        return Joining(arguments.join, arguments.address, arguments.metrics_port)
    if arguments.join is not None or arguments.address or arguments.metrics_port:
        raise ConfigError("--address and --metrics-port belong to --join NAME")
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, check, serve; returns the exit code."""
    parser = service_parser(
        "leeway serve inference-server",
        "An inference server: an engine, its service, and the rollout worker that feeds a run from it. With --backend "
        "only the worker, which samples from a foreign InferenceService.",
    )
    _add_place(parser)
    parser.add_argument("--backend", metavar="HOST:PORT", help="a foreign InferenceService that samples")
    arguments = parser.parse_args(argv)
    try:
        document = load_document(arguments.config, arguments.overrides)
        process = InferenceServerProcess(document, arguments.index, arguments.backend, _joining(arguments))
    except LeewayError as error:
        return report_error("inference_server", error)
    if arguments.check:
        return EXIT_OK
    return serve(process.server_id, process.main, arguments)
