"""Computes past steps again, from a checkpoint, the receipts and the replay buffer's log, and finds what differs.

    checkpoint of step c ── load ──> trainer ── groups of step c+1 ──> compare ── ... ── groups of step s ──> compare

Everything is compared exactly: options, group ids in order, the bytes of every trajectory, every statistic, every
published tensor. The first difference ends it: later ones follow from the first.

Equal bits are promised on the same kind of processor, with the same libraries, threads and ranks. These are among the
options of a receipt (`deciding_options`), so a recomputation elsewhere ends at the option that differs.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass

from learner.run_artifacts.checkpoint import Checkpoint, CheckpointStore
from learner.run_artifacts.receipts import (
    GroupReceipt,
    Options,
    Receipts,
    StepReceipt,
    first_different_tensor,
    full_name,
    options_digest,
)
from learner.trainer import Trainer, UnusableGroupError
from leeway import codec
from leeway.errors import CorruptDataError, NotFoundError, PreconditionError
from leeway.trajectory.assembly import assemble_trajectory
from leeway.types import GroupRecord, PolicyVersion, TrajectoryGroup
from leeway.weights.digests import weights_digest

ExportStep = Callable[[int], AsyncIterator[GroupRecord]]
"""The training groups of a step, from the buffer's log."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a step first differs from its receipt."""

    step: int
    kind: str  # option, group, trajectory, statistic, tensor or version
    name: str
    recorded: str
    recomputed: str

    def __str__(self) -> str:
        return f"step {self.step}: {self.kind} {self.name} was {self.recorded}, but is {self.recomputed}"


class DiffersError(Exception):
    """The answer, raised where the first difference is found."""

    def __init__(self, difference: Difference) -> None:
        super().__init__(str(difference))
        self.difference = difference


def find_start(store: CheckpointStore, receipts: Receipts, step: int) -> Checkpoint:
    """The newest kept checkpoint from which `step` can be computed again.

    Raises:
        NotFoundError: the step has no receipt, or no checkpoint before it is left.
        PreconditionError: the checkpoint belongs to another history than the receipts.
    """
    receipts.step(step)
    kept = [candidate for candidate in store.steps() if candidate < step]
    if not kept:
        raise NotFoundError(
            f"step {step} cannot be computed again: no checkpoint before it is left (kept are: "
            f"{', '.join(map(str, store.steps())) or 'none'}); raise learner.keep_checkpoints in later runs"
        )
    checkpoint = store.load(kept[-1])
    following = receipts.step(checkpoint.version.step + 1)
    if following.parent != full_name(checkpoint.version):
        raise PreconditionError(
            f"{checkpoint.directory} holds {checkpoint.version}, but step {following.step} was trained from "
            f"{following.parent[: following.parent.index('@') + 9]}; the receipts belong to another history"
        )
    return checkpoint


async def recompute(
    trainer: Trainer,
    checkpoint: Checkpoint,
    receipts: Receipts,
    step: int,
    options: Options,
    export_step: ExportStep,
    tell: Callable[[str], None],
) -> Difference | None:
    """Compute every step after the checkpoint up to `step`; `tell` hears of each equal one.

    Args:
        trainer: at any weights; the checkpoint is loaded.
        checkpoint: from `find_start`.
        receipts: of the run.
        step: the last step to compute.
        options: as `deciding_options` gives them now.
        export_step: reads the log.
        tell: hears one line per step.

    Returns:
        The first difference, or None when every step is equal.

    Raises:
        LeewayError: the log or the checkpoint cannot be read.
    """
    trainer.load(checkpoint.directory)
    try:
        for at in range(checkpoint.version.step + 1, step + 1):
            receipt = receipts.step(at)
            _compare_options(receipt, receipts.options.get(receipt.options, {}), options)
            groups = await read_groups(receipt, export_step)
            _train_and_compare(trainer, receipt, groups)
            tell(f"step {at}: equal ({len(groups)} groups, {len(receipt.statistics)} statistics, every tensor)")
    except DiffersError as found:
        return found.difference
    return None


def _compare_options(receipt: StepReceipt, recorded: Options, now: Options) -> None:
    if options_digest(now) == receipt.options:
        return
    for key in sorted({*recorded, *now}):
        if recorded.get(key) != now.get(key):
            before, after = recorded.get(key, "absent"), now.get(key, "absent")
            raise DiffersError(Difference(receipt.step, "option", key, before, after))
    raise CorruptDataError(f"step {receipt.step}: the options of its receipt do not have the digest that it names")


async def read_groups(receipt: StepReceipt, export_step: ExportStep) -> list[TrajectoryGroup]:
    """The step's groups in the order of training, each verified against the receipt.

    Raises:
        DiffersError: naming the group or trajectory that is not the receipt's.
    """
    found = {record.group_id: record async for record in export_step(receipt.step)}
    groups: list[TrajectoryGroup] = []
    for recorded in receipt.groups:
        record = found.pop(recorded.group_id, None)
        if record is None:
            raise DiffersError(
                Difference(receipt.step, "group", recorded.group_id, "trained on", "not this step's in the log")
            )
        groups.append(_verified(receipt.step, recorded, record))
    for group_id in found:
        raise DiffersError(Difference(receipt.step, "group", group_id, "not trained on", "this step's in the log"))
    return groups


def _verified(step: int, recorded: GroupReceipt, record: GroupRecord) -> TrajectoryGroup:
    if record.task_index != recorded.task_index:
        raise DiffersError(
            Difference(step, "group", recorded.group_id, f"task {recorded.task_index}", f"task {record.task_index}")
        )
    members = sorted(record.trajectories, key=lambda trajectory: trajectory.member)
    before, now = [t.trajectory_id for t in recorded.trajectories], [t.trajectory_id for t in members]
    if before != now:
        raise DiffersError(Difference(step, "group", recorded.group_id, ", ".join(before), ", ".join(now)))
    for known, trajectory in zip(recorded.trajectories, members, strict=True):
        digest = codec.chain_digest(codec.EMPTY_CHAIN, *trajectory.chunks)
        if digest.hex() != known.digest:
            raise DiffersError(
                Difference(step, "trajectory", trajectory.trajectory_id, known.digest[:16], digest.hex()[:16])
            )
    return TrajectoryGroup(record.group_id, record.task_index, tuple(assemble_trajectory(t) for t in members))


def _train_and_compare(trainer: Trainer, receipt: StepReceipt, groups: list[TrajectoryGroup]) -> None:
    try:
        result = trainer.train_step(receipt.step, groups, receipt.branches)
    except UnusableGroupError as error:
        raise DiffersError(
            Difference(receipt.step, "group", error.group_id, "trained on", f"refused: {error.message}")
        ) from error
    _compare_statistics(receipt, result.statistics)
    manifest, _ = trainer.published()
    version = full_name(PolicyVersion("", receipt.epoch, receipt.step, weights_digest(manifest)))
    if version != receipt.version:
        name = first_different_tensor(manifest, receipt.tensors)
        kind, name = ("version", "of the step") if name is None else ("tensor", name)
        raise DiffersError(
            Difference(receipt.step, kind, name, f"as in {_short(receipt.version)}", f"as in {_short(version)}")
        )


def _compare_statistics(receipt: StepReceipt, now: Mapping[str, float]) -> None:
    for name in [*receipt.statistics, *(name for name in now if name not in receipt.statistics)]:
        before, after = receipt.statistics.get(name), now.get(name)
        if before != after:
            raise DiffersError(Difference(receipt.step, "statistic", name, repr(before), repr(after)))


def _short(version: str) -> str:
    return version[: version.index("@") + 9]
