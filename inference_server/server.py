"""One inference server, put together from a configuration file.

    weight receiver ──> served policy ──> engine <── InferenceService (others may generate and push, too)
                              │             ▲
                              └── rollout worker ──> replay buffer

All parts end together: when the run has finished, when a stop is requested, or with the first error that no part
handles itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import logging
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry

from inference_server.engine import Engine, EngineProcess
from inference_server.engines.remote import RemoteEngine
from inference_server.rollout.reward import RewardRunner
from inference_server.rollout.text import HuggingFaceTokenizer, Tokenizer
from inference_server.rollout.worker import RolloutWorker
from inference_server.served_policy import ServedPolicy
from inference_server.service import SERVICE_NAME, add_inference_service
from inference_server.weights.receiver import WeightReceiver
from leeway.arithmetic import ArithmeticTokenizer
from leeway.config import ENGINES, EngineOptions, RunConfiguration, load_configuration
from leeway.config.references import open_reward, open_tasks
from leeway.errors import ConfigError, LeewayError
from leeway.replay_client import ReplayClient
from leeway.rpc import cancel_and_wait, start_server
from leeway.service.metrics import InferenceServerMetrics, serve_metrics
from leeway.service.ports import free_port
from leeway.service.process import EXIT_OK, report_error, serve, service_parser, tell_run_finished, unless_stopped
from leeway.tasks import TaskSet

log = logging.getLogger("inference_server")

StartEngine = Callable[[Path | None, EngineOptions], Awaitable[Engine]]
"""Loads the model of a directory (None in a rehearsal) and returns the engine."""


@dataclass(frozen=True, slots=True)
class JoinArguments:
    """Arguments of a server that joins a running run without being listed in its configuration.

    Args:
        name: unique in the run.
        address: where it listens; None takes a free port of this host.
        metrics_port: of its metrics; 0 takes a free one.
    """

    name: str
    address: str | None = None
    metrics_port: int = 0


class InferenceServerProcess:
    """One inference server of a run: a configured one by its index, or one that joins beside those.

    Args:
        configuration: the run's.
        index: which entry of network.inference_servers and metrics.inference_servers this is.
        backend: address of a foreign InferenceService that samples, in place of the configured one.
        joining: set for a server that the configuration does not list; `index` is ignored then.

    Raises:
        ConfigError: there is no server with that index, or one that joins takes the name of a configured one.
    """

    def __init__(
        self,
        configuration: RunConfiguration,
        index: int,
        backend: str | None = None,
        joining: JoinArguments | None = None,
    ) -> None:
        self.configuration = configuration
        self.run = configuration.run
        self.model = configuration.model
        self.task = configuration.task
        self.network = configuration.network
        self.options = configuration.inference_server
        self.security = self.network.security()
        if joining is None:
            self._take_place(index, backend)
        else:
            self._join(joining, backend)

    def _take_place(self, index: int, backend: str | None) -> None:
        addresses, backends = self.network.inference_servers, self.options.backends
        if not 0 <= index < len(addresses):
            raise self.configuration.refused(
                f"network.inference_servers: lists {len(addresses)}, none for --index {index}"
            )
        self.server_id = f"server-{index}"
        self.address = addresses[index]
        self.metrics_port = self.configuration.metrics.inference_servers[index]
        self.engine = self.options.engine_of(index)
        self.backend = backend or (backends[index] if backends else None)

    def _join(self, joining: JoinArguments, backend: str | None) -> None:
        if joining.name in (f"server-{index}" for index in range(len(self.network.inference_servers))):
            raise ConfigError(
                f"--join: {joining.name} is one of the configured servers; give another name, or start that one with "
                "--index"
            )
        self.server_id = joining.name
        self.address = joining.address or f"127.0.0.1:{free_port('127.0.0.1')}"
        self.metrics_port = joining.metrics_port or free_port(self.configuration.metrics.host)
        self.engine = self.options.engine
        self.backend = backend

    def open_tasks(self) -> TaskSet:
        """The run's tasks, once it is known that the engine can be imported.

        Raises:
            ConfigError: something that the configuration names is not there.
        """
        library = ENGINES[self.engine].library
        if self.backend is None and library is not None and importlib.util.find_spec(library) is None:
            raise self.configuration.refused(
                f"inference_server.engine: {sys.executable} has no {library}; set "
                f"inference_server.{self.engine}.python to the interpreter of its environment (`make engine-env "
                f"ENGINE={self.engine}` builds one)"
            )
        return open_tasks(self.configuration)

    async def main(self, stop: asyncio.Event) -> None:
        """Serve and feed the run until it has finished or `stop` is set."""
        registry = CollectorRegistry()
        metrics = InferenceServerMetrics(registry)
        tasks = self.open_tasks()
        tokenizer = self._make_tokenizer()
        serve_metrics(registry, self.configuration.metrics.host, self.metrics_port)
        async with contextlib.AsyncExitStack() as stack:
            reward = RewardRunner(self.task.reward, self.task.python_path, self.options.reward, metrics)
            stack.push_async_callback(reward.aclose)
            engine = await unless_stopped(stop, self._start(reward))
            if engine is None:
                return
            stack.push_async_callback(engine.aclose)
            if isinstance(engine, EngineProcess):
                for collector in engine.collectors():
                    registry.register(collector)
            client = ReplayClient(self.network.replay_buffer, self.run.name, self.security)
            stack.push_async_callback(client.aclose)
            policy = ServedPolicy(engine, self.run.name)
            receiver = WeightReceiver(
                policy=policy,
                signature=engine.info().signature,
                run=self.run.name,
                server_id=self.server_id,
                address=self.network.policy,
                security=self.security,
                transports=self.network.weight_transports,
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
                options=self.options.worker,
                writer_options=self.options.writer,
                metrics=metrics,
            )
            await self._serve(engine, policy, receiver, worker, stop)
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

    async def _start(self, reward: RewardRunner) -> Engine:
        """Start the reward's workers, then the engine: a model takes longer to load."""
        await reward.start()
        return await self._make_engine()

    async def _make_engine(self) -> Engine:
        if self.backend is not None:
            return await RemoteEngine.connect(
                self.backend, self.security, timeout_seconds=self.options.worker.trajectory_timeout_seconds
            )
        entry = ENGINES[self.engine]
        module, _, function = entry.start.partition(":")
        start: StartEngine = getattr(importlib.import_module(module), function)
        return await start(None if entry.rehearsal else self.model.directory, self.options.options_of(self.engine))

    def _make_tokenizer(self) -> Tokenizer:
        if ENGINES[self.engine].rehearsal:
            return ArithmeticTokenizer()
        return HuggingFaceTokenizer(self.model.directory, chat=self.task.chat)


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


def _joining(arguments: Namespace) -> JoinArguments | None:
    """Raises ConfigError: an option of --join without it."""
    if arguments.join:
        return JoinArguments(arguments.join, arguments.address, arguments.metrics_port)
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
        configuration = load_configuration(arguments.config, arguments.overrides)
        process = InferenceServerProcess(configuration, arguments.index, arguments.backend, _joining(arguments))
        if arguments.check:
            process.open_tasks()
            open_reward(configuration)
            return EXIT_OK
    except LeewayError as error:
        return report_error("inference_server", error)
    return serve(process.server_id, process.main, arguments)
