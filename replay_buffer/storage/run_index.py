"""What has ended in one run: its part of the index."""

from __future__ import annotations

from collections.abc import Iterator

from replay_buffer.rules.groups import EvaluationState, Group, RecordHandle
from replay_buffer.storage.index import Index
from replay_buffer.storage.index_file import Filter


class RunIndex:
    """What has ended in one run: `Ended` of its state."""

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
