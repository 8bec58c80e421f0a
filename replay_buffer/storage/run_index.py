"""One run's part of the index, and the groups of a run, ended or not, that match a filter."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import merge

from leeway.errors import NotFoundError
from leeway.types import Purpose
from replay_buffer.rules.groups import EvaluationState, Group, RecordHandle
from replay_buffer.rules.state import RunState
from replay_buffer.storage.index import Index
from replay_buffer.storage.index_file import Filter


class RunIndex:
    """Ended groups and evaluations of one run: the `Ended` of its state."""

    def __init__(self, index: Index, run: str) -> None:
        self._index = index
        self._run = run
        self._prefix = f"{run}-g"

    def get(self, group_id: str) -> Group | None:
        number = group_id.removeprefix(self._prefix)
        if number == group_id or not number.isdecimal():
            return None
        group = self._index.get(self._run, int(number))
        return group if group is not None and group.group_id == group_id else None

    def put(self, group: Group) -> None:
        self._index.put(self._run, group)

    def batch(self, step: int) -> tuple[str, ...]:
        return self._index.batch(self._run, step)

    def evaluation(self, evaluation_id: str) -> EvaluationState | None:
        return self._index.get_evaluation(self._run, evaluation_id)

    def put_evaluation(self, evaluation: EvaluationState, record: RecordHandle) -> None:
        self._index.put_evaluation(self._run, evaluation, record)

    def group_id(self, created: int) -> str:
        """The id of a group by its number."""
        return f"{self._prefix}{created}"

    def created(self, wanted: Filter, *, newest: int = 0) -> Iterator[int]:
        """The numbers of matching groups, ascending; `newest` keeps only so many."""
        return self._index.created(self._run, wanted, newest=newest)

    def first_whole_step(self, groups_per_step: int) -> int | None:
        """The oldest committed step of which no group has been retired."""
        return self._index.first_whole_step(self._run, groups_per_step)

    def dead_letters(self, newest: int) -> list[Group]:
        return self._index.dead_letters(self._run, newest)

    def groups(self) -> Iterator[Group]:
        for number in self._index.created(self._run, Filter()):
            group = self._index.get(self._run, number)
            if group is not None:
                yield group


def check_kept(state: RunState, wanted: Filter) -> None:
    """Say so when what a step trained on is no longer there, instead of giving less.

    Raises:
        NotFoundError: groups of the step have been retired.
    """
    step, ended = wanted.step, state.ended
    assert isinstance(ended, RunIndex)
    if not 0 < step <= state.committed_step or wanted.purpose is Purpose.EVAL:
        return
    if len(state.batch(step)) < state.spec.groups_per_step:
        kept = ended.first_whole_step(state.spec.groups_per_step)
        there = (
            "no committed step's groups are left" if kept is None else f"those of step {kept} and later are still there"
        )
        raise NotFoundError(
            f"run {state.spec.run!r}: the groups that step {step} trained on have been retired from the log "
            f"([replay_buffer] retain_bytes, retain_seconds); {there}"
        )


def select(state: RunState, wanted: Filter, limit: int = 0) -> Iterator[str]:
    """Ids of matching groups, in the order of issue; a limit keeps the newest.

    What is live at the first call is listed by what it was then, whatever becomes of it while the rest is read.
    """
    ended = state.ended
    assert isinstance(ended, RunIndex)
    unended = {group.created: group for group in state.groups.unended.values()}
    live = sorted(created for created, group in unended.items() if wanted.matches(group))
    older = (created for created in ended.created(wanted, newest=limit) if created not in unended)
    if not limit:
        yield from (ended.group_id(created) for created in merge(older, live))
        return
    newest = sorted([*older, *live])[-limit:]
    yield from (ended.group_id(created) for created in newest)
