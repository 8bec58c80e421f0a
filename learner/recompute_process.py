"""A past step again, by as many ranks as trained it.

    python -m learner.recompute_process --config FILE --directory DIR --step N

    rank 0        loads the checkpoint, trains, compares, prints
      │ commands as in training (learner.training.distributed)
      ▼
    rank r > 0    follows; takes its slice of each step from the receipts and the log, as rank 0 does

The last line on stdout is the answer: `equal: ...` or `different: ...`. `leeway recompute-step` starts this beside a
replay buffer that serves the run's log.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from learner.factory import join_world, make_ranked_trainer, make_trainer
from learner.lineage import Branch
from learner.run_artifacts.checkpoint import CheckpointStore
from learner.run_artifacts.receipts import Receipts, deciding_options, read_receipts
from learner.run_artifacts.recompute import ExportStep, find_start, read_groups, recompute
from learner.trainer import Trainer
from leeway.config import load_configuration
from leeway.errors import ConfigError
from leeway.replay_client import ReplayClient
from leeway.service.process import report_error, serve, service_parser
from leeway.types import GroupRecord, Purpose, TrajectoryGroup


class RecomputeProcess:
    """One rank of a recomputed step."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        configuration = load_configuration(arguments.config, arguments.overrides)
        self._options = configuration.learner
        self._run = configuration.run
        self._model = configuration.model
        self._network = configuration.network
        self._directory: Path = arguments.directory
        self._step: int = arguments.step

    async def main(self, _stop: asyncio.Event) -> None:
        """Recompute, or follow rank 0."""
        network = self._network
        receipts = read_receipts(self._directory)
        buffer = ReplayClient(network.replay_buffer, self._run.name, network.security())
        try:
            if self._options.ranks == 1:
                trainer = make_trainer(self._options, self._model)
                await self._recompute(trainer, receipts, buffer)
            else:
                await self._recompute_ranked(receipts, buffer)
        finally:
            await buffer.aclose()

    async def _recompute_ranked(self, receipts: Receipts, buffer: ReplayClient) -> None:
        from learner.training.distributed import DistributedTrainer, follow

        world = join_world(self._options)
        ranked = make_ranked_trainer(self._options, self._model, world)

        async def my_groups(step: int, _branches: Sequence[Branch]) -> Sequence[TrajectoryGroup]:
            return (await read_groups(receipts.step(step), _export(buffer)))[world.rank :: world.size]

        if world.rank:
            await follow(ranked, world, my_groups)
        else:
            trainer = DistributedTrainer(ranked, world)
            await self._recompute(trainer, receipts, buffer)
            trainer.stop()
        world.close()

    async def _recompute(self, trainer: Trainer, receipts: Receipts, buffer: ReplayClient) -> None:
        store = CheckpointStore(self._directory / "checkpoints", keep=self._options.keep_checkpoints)
        checkpoint = find_start(store, receipts, self._step)
        _tell(f"starting from the checkpoint of step {checkpoint.version.step}")
        options = deciding_options(self._options, trainer, seed=self._run.seed)
        difference = await recompute(trainer, checkpoint, receipts, self._step, options, _export(buffer), _tell)
        if difference is None:
            _tell(f"equal: step {self._step} gives the same statistics and weights, bit for bit")
        else:
            _tell(f"different: {difference}")


def _export(buffer: ReplayClient) -> ExportStep:
    def export_step(step: int) -> AsyncIterator[GroupRecord]:
        return buffer.export_groups(purpose=Purpose.TRAIN, step=step)

    return export_step


def _tell(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    """Parse the arguments and recompute."""
    parser = service_parser("learner.recompute_process", "Computes a past step of a run again and compares it.")
    parser.add_argument("--directory", type=Path, required=True, metavar="DIR", help="the run's folder")
    parser.add_argument("--step", type=int, required=True, metavar="STEP", help="a trained step")
    arguments = parser.parse_args()
    try:
        process = RecomputeProcess(arguments)
    except ConfigError as error:
        return report_error("recompute-step", error)
    return serve("recompute-step", process.main, arguments)


if __name__ == "__main__":
    sys.exit(main())
