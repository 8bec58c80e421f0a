"""`leeway serve learner --config FILE`: one incarnation of a run's learner."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from prometheus_client import CollectorRegistry

from learner.factory import make_trainer
from learner.lineage import Branch
from learner.loop import LAST_ANSWER_SECONDS, Context, Learner
from learner.run_artifacts.checkpoint import Checkpoint, CheckpointStore
from learner.run_artifacts.journal import Journal, summarize, write_summary
from learner.run_artifacts.receipts import ReceiptBook, deciding_options
from learner.run_artifacts.run_lock import held_run
from learner.trainer import Trainer
from learner.weights.outlets import WeightOutlet
from learner.weights.publisher import Publisher
from leeway.config import RunConfiguration, load_configuration
from leeway.config.references import open_tasks
from leeway.errors import ConfigError, NotFoundError, PreconditionError
from leeway.replay_client import ReplayClient
from leeway.rpc import start_server
from leeway.service.metrics import LearnerMetrics, serve_metrics
from leeway.service.process import EXIT_OK, report_error, serve, service_parser, unless_stopped
from leeway.tasks import TaskSet
from leeway.types import PolicyVersion, RunSpec, TrajectoryGroup
from leeway.v1 import policy_pb2, policy_pb2_grpc
from leeway.weights.digests import weights_digest
from leeway.weights.transports import TRANSPORTS, load_side

log = logging.getLogger(__name__)


class LearnerProcess:
    """One learner process, assembled from its configuration."""

    def __init__(self, configuration: RunConfiguration, *, supervised: bool = False) -> None:
        self.configuration = configuration
        self.run = configuration.run
        self.model = configuration.model
        self.network = configuration.network
        self.options = configuration.learner
        self.directory = self.run.run_directory
        self._listen = _tell_supervisor if supervised else _log_record
        self.security = self.network.security()

    async def main(self, stop: asyncio.Event) -> None:
        """Be the learner, or one of its ranks."""
        tasks = open_tasks(self.configuration)
        if self.options.ranks == 1:
            with held_run(self.directory):
                await self._lead(make_trainer(self.options, self.model), tasks, stop)
            return
        from learner.factory import join_world, make_ranked_trainer
        from learner.training.distributed import DistributedTrainer, follow

        world = join_world(self.options)
        ranked = make_ranked_trainer(self.options, self.model, world)
        if world.rank:
            # Signals reach every rank; rank 0 decides when all of them stop.
            async with self._replay_client() as buffer:

                async def my_groups(step: int, branches: Sequence[Branch]) -> Sequence[TrajectoryGroup]:
                    epoch = max(epoch for epoch, _ in branches)
                    timeout = self.options.draw_timeout_seconds
                    return await buffer.draw_batch(epoch, step, timeout, rank=world.rank, world_size=world.size)

                await follow(ranked, world, my_groups)
        else:
            trainer = DistributedTrainer(ranked, world)
            with held_run(self.directory):
                await self._lead(trainer, tasks, stop)
            trainer.stop()
        world.close()

    async def _lead(self, trainer: Trainer, tasks: TaskSet, stop: asyncio.Event) -> None:
        """Restore, open, train, and leave a checkpoint and a summary behind."""
        registry = CollectorRegistry()
        metrics = LearnerMetrics(registry)
        serve_metrics(registry, self.configuration.metrics.host, self.configuration.metrics.learner)
        checkpoints = CheckpointStore(self.directory / "checkpoints", keep=self.options.keep_checkpoints)
        root = PolicyVersion(self.run.name, 0, 0, weights_digest(trainer.published()[0]))
        spec = self._spec(trainer, tasks, root)
        buffer = ReplayClient(self.network.replay_buffer, self.run.name, self.security)
        if checkpoints.steps() and not await unless_stopped(stop, _drop_abandoned(checkpoints, buffer)):
            await buffer.aclose()
            return
        restored = self._restore(trainer, checkpoints, root)
        outlets = self._make_outlets(metrics)
        publisher = Publisher(
            self.run.name,
            trainer.signature,
            metrics,
            outlets,
            max_delta_chain=self.options.max_delta_chain,
        )
        server = await start_server(
            self.network.policy,
            lambda server: policy_pb2_grpc.add_PolicyServiceServicer_to_server(publisher, server),
            [policy_pb2.DESCRIPTOR.services_by_name["PolicyService"].full_name],
            self.security,
        )
        journal = Journal(self.directory / "metrics.jsonl", resume_step=restored.version.step, listen=self._listen)
        receipts = ReceiptBook(
            self.directory,
            deciding_options(self.options, trainer, seed=self.run.seed),
            resume_step=restored.version.step,
        )
        learner = Learner(
            Context(
                trainer,
                buffer,
                publisher,
                checkpoints,
                journal,
                receipts,
                metrics,
                self.directory,
                stop,
                tasks.train_tags,
            ),
            spec,
            self.options,
            self.configuration.evaluation,
            restored,
        )
        try:
            finished = await learner.run()
            if not learner.opened and not finished:
                log.info("stopped before the run was open")
                return
            if stop.is_set():
                buffer.patience_seconds = LAST_ANSWER_SECONDS
            status = await buffer.run_status()
            write_summary(self.directory, summarize(journal.records, status, publisher.push_seconds))
            log.info("%s at step %d", "finished" if finished else "stopped with a checkpoint", learner.step)
        finally:
            journal.close()
            receipts.close()
            await server.stop(grace_seconds=1.0)
            await buffer.aclose()
            for outlet in outlets:
                await outlet.aclose()

    @asynccontextmanager
    async def _replay_client(self) -> AsyncGenerator[ReplayClient]:
        client = ReplayClient(self.network.replay_buffer, self.run.name, self.security)
        try:
            yield client
        finally:
            await client.aclose()

    def _restore(self, trainer: Trainer, checkpoints: CheckpointStore, root: PolicyVersion) -> Checkpoint:
        """The newest checkpoint, loaded; a fresh run makes one of its first weights."""
        restored = checkpoints.newest()
        if restored is None:
            return checkpoints.save(root, [], [], trainer.save)
        if restored.version.run != self.run.name:
            raise PreconditionError(
                f"{restored.directory} belongs to run {restored.version.run!r}, not {self.run.name!r}"
            )
        trainer.load(restored.directory)
        log.info("restored the checkpoint of step %d", restored.version.step)
        return restored

    def _spec(self, trainer: Trainer, tasks: TaskSet, root: PolicyVersion) -> RunSpec:
        return RunSpec(
            run=self.run.name,
            groups_per_step=self.run.groups_per_step,
            members=self.run.members,
            max_staleness=self.run.max_staleness,
            total_steps=self.run.steps,
            seed=self.run.seed,
            train_task_count=len(tasks.train),
            sampling=self.configuration.sampling.params(trainer.stop_token_ids),
            signature=trainer.signature,
            dataset_digest=tasks.digest,
            root=root,
            max_attempts=self.run.max_attempts,
            drop_no_signal=self.run.drop_no_signal,
        )

    def _make_outlets(self, metrics: LearnerMetrics) -> list[WeightOutlet]:
        """The ways that weights leave this learner, beside gRPC."""
        host, patience_seconds = self.network.policy.rpartition(":")[0], self.options.broadcast_patience_seconds
        references = [TRANSPORTS[name].outlet for name in self.network.weight_transports]
        return [load_side(reference)(metrics, host, patience_seconds) for reference in references if reference]


async def _drop_abandoned(checkpoints: CheckpointStore, buffer: ReplayClient) -> bool:
    """Ask the buffer whether the run was rolled back, and remove the checkpoints of what it abandoned."""
    try:
        status = await buffer.run_status()
    except NotFoundError:
        return True  # OpenRun says what that means
    if status.rollback is not None and (steps := checkpoints.discard_abandoned(status.rollback)):
        log.warning("the run was rolled back to %s: checkpoints of steps %s are gone", status.rollback.version, steps)
    return True


def _tell_supervisor(line: str) -> None:
    """Write a journal line to stdout, which `leeway run` reads."""
    sys.stdout.write(line)
    sys.stdout.flush()


def _log_record(line: str) -> None:
    """Log a journal line for a person who started the learner by hand."""
    record = json.loads(line)
    match record["kind"]:
        case "step":
            log.info(
                "step %d: reward %.3f, %d tokens, trained in %.2f s after %.2f s of waiting",
                *(record["step"], record["reward_mean"], record["num_trained_tokens"]),
                *(record["step_seconds"], record["batch_wait_seconds"]),
            )
        case "evaluation":
            log.info(
                "step %d: held-out reward %.3f over %d draws",
                *(record["step"], record["reward_mean"], record["draws"]),
            )
        case _:
            pass  # logged where it happened


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, check, run."""
    parser = service_parser("leeway serve learner", "The learner of one run: draws groups, trains, publishes weights.")
    arguments = parser.parse_args(argv)
    try:
        configuration = load_configuration(arguments.config, arguments.overrides)
        process = LearnerProcess(configuration, supervised=arguments.supervised)
        if arguments.check:
            open_tasks(configuration)
            return EXIT_OK
    except ConfigError as error:
        return report_error("learner", error)
    Path(process.directory).mkdir(parents=True, exist_ok=True)
    return serve("learner", process.main, arguments)


if __name__ == "__main__":
    sys.exit(main())
