"""Step receipts, `receipts.jsonl`: what each step was computed from and what came out, to be checked again later.

    {"kind": "options", "digest", "options": {key: value, ...}}   before the first step under these options
    {"kind": "step", "step", "epoch", "options": digest, "branches", "parent", "version", "versions", "groups",
     "statistics", "tensors"}   after each step

`groups` are in the order of training. Per trajectory: its id, the chain digest of its bytes, its sampling seed, and
which of `versions` sampled it. `tensors` holds the first bytes of each published tensor's digest, in the manifest's
order: enough to name the first that differs. Like the journal, the file tells the surviving history only: a learner
that resumes at step s drops what an abandoned branch wrote beyond s.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from learner.lineage import Branch
from learner.run_artifacts.journal import read_journal
from learner.trainer import Trainer
from leeway.config import LearnerOptions
from leeway.errors import CorruptDataError, NotFoundError
from leeway.service.durable import replace_file
from leeway.types import PolicyVersion, SegmentKind, Trajectory, TrajectoryGroup, WeightManifest

FILE: Final = "receipts.jsonl"
_FINGERPRINT_BYTES: Final = 4

Options = Mapping[str, str]
"""Everything beside data and weights that decides a step's numbers: key -> value as JSON."""


@dataclass(frozen=True, slots=True)
class TrajectoryReceipt:
    """One trajectory that a step trained on."""

    trajectory_id: str
    digest: str  # hex, chain digest of its chunks
    seed: int | None  # it was sampled with; None when the engine did not say
    versions: tuple[int, ...]  # places in StepReceipt.versions


@dataclass(frozen=True, slots=True)
class GroupReceipt:
    """One group that a step trained on, its trajectories in member order."""

    group_id: str
    task_index: int
    trajectories: tuple[TrajectoryReceipt, ...]


@dataclass(frozen=True, slots=True)
class StepReceipt:
    """One optimizer step."""

    step: int
    epoch: int
    options: str  # digest
    branches: tuple[Branch, ...]  # where each epoch so far started, for the staleness of tokens
    parent: str  # version that was trained
    version: str  # version that came out
    versions: tuple[str, ...]  # that sampled the step's tokens
    groups: tuple[GroupReceipt, ...]
    statistics: Mapping[str, float]
    tensors: str  # base64 of the first bytes of each published tensor's digest


def full_name(version: PolicyVersion) -> str:
    """A version with its whole digest: `epoch.step@digest`."""
    return f"{version.epoch}.{version.step}@{version.digest.hex()}"


def make_receipt(
    options: Options,
    branches: Sequence[Branch],
    parent: PolicyVersion,
    version: PolicyVersion,
    groups: Sequence[TrajectoryGroup],
    statistics: Mapping[str, float],
    manifest: WeightManifest,
) -> StepReceipt:
    """The receipt of the step from `parent` to `version`."""
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    used = sorted({full_name(span.version) for t in trajectories for span in t.version_spans})
    place = {name: index for index, name in enumerate(used)}
    return StepReceipt(
        step=version.step,
        epoch=version.epoch,
        options=options_digest(options),
        branches=tuple(branches),
        parent=full_name(parent),
        version=full_name(version),
        versions=tuple(used),
        groups=tuple(
            GroupReceipt(group.group_id, group.task_index, tuple(_describe(t, place) for t in group.trajectories))
            for group in groups
        ),
        statistics=dict(statistics),
        tensors=tensor_fingerprints(manifest),
    )


def _describe(trajectory: Trajectory, place: Mapping[str, int]) -> TrajectoryReceipt:
    seeds = [s.sampling.seed for s in trajectory.segments if s.kind is SegmentKind.MODEL and s.sampling is not None]
    versions = dict.fromkeys(place[full_name(span.version)] for span in trajectory.version_spans)
    return TrajectoryReceipt(
        trajectory.trajectory_id, trajectory.digest.hex(), seeds[0] if seeds else None, tuple(versions)
    )


def tensor_fingerprints(manifest: WeightManifest) -> str:
    """The first bytes of every tensor's digest, in the manifest's order, as base64."""
    return base64.b64encode(b"".join(entry.digest[:_FINGERPRINT_BYTES] for entry in manifest.tensors)).decode()


def first_different_tensor(manifest: WeightManifest, recorded: str) -> str | None:
    """Name of the first tensor whose fingerprint is not the recorded one; None when all agree."""
    before, now = base64.b64decode(recorded), base64.b64decode(tensor_fingerprints(manifest))
    for index, entry in enumerate(manifest.tensors):
        piece = slice(index * _FINGERPRINT_BYTES, (index + 1) * _FINGERPRINT_BYTES)
        if before[piece] != now[piece]:
            return entry.name
    return None if len(before) == len(now) else "(the number of tensors)"


def deciding_options(options: LearnerOptions, trainer: Trainer, *, seed: int) -> Options:
    """Flatten everything that decides a step's numbers besides data and weights."""
    values: dict[str, Any] = {
        "run.seed": seed,
        "model": trainer.signature.model_digest.hex(),
        "learner.trainer": options.trainer,
        "learner.num_threads": options.num_threads,
        "learner.ranks": options.ranks,
    }
    values |= trainer.numerics
    values |= {f"learner.training.{key}": value for key, value in options.training.model_dump(mode="json").items()}
    return {key: json.dumps(value) for key, value in values.items()}


def options_digest(options: Options) -> str:
    """SHA-256 of the options as canonical JSON, in hex."""
    return hashlib.sha256(json.dumps(options, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class ReceiptBook:
    """Appends receipts to a run's file."""

    def __init__(self, run_directory: Path, options: Options, *, resume_step: int) -> None:
        """Open the file, keeping receipts up to `resume_step`."""
        self.options = options
        path = run_directory / FILE
        kept = [record for record in read_journal(path) if record["kind"] != "step" or record["step"] <= resume_step]
        replace_file(path, "".join(_line(record) for record in kept))
        self._known = {record["digest"] for record in kept if record["kind"] == "options"}
        self._file = path.open("a", encoding="utf-8")

    def append(self, receipt: StepReceipt) -> None:
        """Write one receipt, and before the first one of these options the options."""
        if receipt.options not in self._known:
            self._known.add(receipt.options)
            self._write({"kind": "options", "digest": receipt.options, "options": dict(self.options)})
        self._write({"kind": "step", **asdict(receipt)})

    def sync(self) -> None:
        """Make what was written durable; called with each checkpoint."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        self._file.write(_line(record))
        self._file.flush()


@dataclass(frozen=True, slots=True)
class Receipts:
    """A run's receipts, read back."""

    path: Path
    steps: Mapping[int, StepReceipt]
    options: Mapping[str, Options]  # by digest

    def step(self, step: int) -> StepReceipt:
        """One step's receipt.

        Raises:
            NotFoundError: there is none; the message says which there are.
        """
        if step not in self.steps:
            there = f"steps {min(self.steps)} to {max(self.steps)}" if self.steps else "none"
            raise NotFoundError(f"{self.path}: no receipt of step {step}; there are: {there}")
        return self.steps[step]


def read_receipts(run_directory: Path) -> Receipts:
    """Every whole receipt of a run.

    Raises:
        CorruptDataError: a line is not a receipt.
    """
    path = run_directory / FILE
    steps: dict[int, StepReceipt] = {}
    options: dict[str, Options] = {}
    try:
        for record in read_journal(path):
            if record["kind"] == "options":
                options[record["digest"]] = record["options"]
            else:
                steps[record["step"]] = _step_from_json(record)
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptDataError(f"{path}: a line is not a receipt: {type(error).__name__} {error}") from error
    return Receipts(path, steps, options)


def _step_from_json(record: Mapping[str, Any]) -> StepReceipt:
    groups = tuple(
        GroupReceipt(
            group["group_id"],
            group["task_index"],
            tuple(
                TrajectoryReceipt(t["trajectory_id"], t["digest"], t["seed"], tuple(t["versions"]))
                for t in group["trajectories"]
            ),
        )
        for group in record["groups"]
    )
    fields: dict[str, Any] = {key: value for key, value in record.items() if key != "kind"}
    fields |= {"branches": tuple((epoch, step) for epoch, step in record["branches"])}
    fields |= {"versions": tuple(record["versions"]), "groups": groups}
    return StepReceipt(**fields)


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"
