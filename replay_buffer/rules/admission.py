"""Admission: how stale a group may get, and how many groups may be live at once.

Symbols: h head step, B groups per step, S bound, T last step, L the live groups (OPEN, READY, or DRAWN in an unsealed
batch).

    D(g) = S + smallest lineage step among the group's sampled tokens     its deadline: the last head it can be drawn at
    S = 0: D(g) = h if every token is from the head itself, else past     a common ancestor is not enough

A new group g' that would get deadline D' goes out iff, with L' = L and g',

    for all k in [h, h+S]:  |{g in L': D(g) <= k}| <= (k - h + 1) * B     enough steps until k
    |L'| <= (T - h) * B                                                   enough steps until the end

Worked: h = 10, B = 4, S = 2. With 11 groups of D = 12 in L, one more of D = 12 fits (12 <= 3 * 4), and then none; one
of D = 10 instead fits as well (1 <= 4 at k = 10, 12 <= 12 at k = 12).

A reissue takes no slot and needs D >= h.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Final

from leeway.types import PolicyVersion
from replay_buffer.rules.groups import Group
from replay_buffer.rules.state import RunState

PAST: Final = -1
"""A deadline before every head."""


def deadline_of(run: RunState, versions: Iterable[PolicyVersion]) -> int:
    """D for tokens of these versions.

    A version that was never registered, has been forgotten, or was discarded by an explicit rollback counts as past: it
    is never trained on.
    """
    lineage, bound = run.lineage, run.spec.max_staleness
    if bound == 0:
        return lineage.head.step if all(version == lineage.head for version in versions) else PAST
    return min(
        (bound + lineage.lineage_step(version) if version in lineage and not lineage.is_discarded(version) else PAST)
        for version in versions
    )


def deadline(run: RunState, group: Group) -> int:
    """D of a live group."""
    return deadline_of(run, group.sampled_versions)


def is_stale(run: RunState, group: Group) -> bool:
    """Whether no surviving step can take the group any more."""
    return deadline(run, group) < run.head.step


def may_serve(run: RunState, version: PolicyVersion) -> bool:
    """Whether a server at this registered version may get training tickets: lag <= S; with S = 0 the head itself."""
    return deadline_of(run, (version,)) >= run.head.step


class Admission:
    """The inequality, for several new groups in a row."""

    def __init__(self, run: RunState, reissued: Mapping[str, int] | None = None) -> None:
        """Count what is live; `reissued` has new deadlines of groups that the same call reissues."""
        reissued = reissued or {}
        spec, self._head_step = run.spec, run.head.step
        self._groups_per_step, self._max_staleness = spec.groups_per_step, spec.max_staleness
        self._remaining = (spec.total_steps - self._head_step) * spec.groups_per_step
        self._by_deadline = Counter(
            reissued[group.group_id] if group.group_id in reissued else deadline(run, group)
            for group in run.occupying()
        )

    def admits(self, new_deadline: int) -> bool:
        """Whether a new group with this deadline keeps every bound; counts it when it does."""
        with_new = self._by_deadline.copy()
        with_new[new_deadline] += 1
        if new_deadline < self._head_step or not self._holds(with_new):
            return False
        self._by_deadline = with_new
        return True

    def _holds(self, by_deadline: Counter[int]) -> bool:
        head, per_step = self._head_step, self._groups_per_step
        if by_deadline.total() > self._remaining:
            return False
        # Between two deadlines the left side stands still while the right side grows.
        early = 0
        for due in sorted(by_deadline):
            early += by_deadline[due]
            if due <= head + self._max_staleness and early > (max(due, head) - head + 1) * per_step:
                return False
        return True
