"""Decisions about evaluations: tickets pinned to one version, keyed (evaluation, version, task, member)."""

from __future__ import annotations

from leeway.errors import NotFoundError, PreconditionError
from leeway.types import Evaluation, EvaluationResult
from replay_buffer.rules.lifecycle import check_epoch, check_live
from replay_buffer.rules.state import RunState
from replay_buffer.rules.transitions import EvaluationCreated


def decide_evaluation(run: RunState, epoch: int, evaluation: Evaluation) -> EvaluationCreated | None:
    """A new evaluation; None when it exists already.

    An id whose version was abandoned by a rollback may be used again for the version that took its place.

    Raises:
        FencedError: a newer learner has opened the run.
        PreconditionError: the version was never registered, or the id stands for another evaluation.
    """
    check_epoch(run, epoch)
    name, known = run.spec.run, run.evaluation(evaluation.evaluation_id)
    if known is not None and known.evaluation == evaluation:
        return None
    check_live(run)
    if evaluation.version not in run.lineage:
        raise PreconditionError(f"run {name!r}: {evaluation.version} was never registered; advance to it first")
    if known is not None and not run.lineage.is_abandoned(known.evaluation.version):
        raise PreconditionError(
            f"run {name!r}: evaluation {evaluation.evaluation_id!r} already measures {known.evaluation.version} "
            "or has other tasks, members or sampling; choose another id"
        )
    return EvaluationCreated(evaluation, epoch)


def result_of(run: RunState, evaluation_id: str) -> EvaluationResult:
    """The results of an evaluation so far.

    Raises:
        NotFoundError: no such evaluation.
    """
    if run.evaluation(evaluation_id) is None:
        raise NotFoundError(f"run {run.spec.run!r} has no evaluation {evaluation_id!r}")
    return run.evaluation_result(evaluation_id)
