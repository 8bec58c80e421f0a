"""The lineage: policy versions as a tree, and the distance between two along the history that survives.

    lag(v) = step(head) - lineage step(v)       lineage step(v) = step(common ancestor of v and head)

A learner that restarts from a checkpoint branches off there. What it abandoned keeps its place in the tree: the
*lineage step* of a version is the step of its newest ancestor (itself included) on the path from the root to the head.

    root ── 1 ── 2 ── 3 ── 4       epoch 1, abandoned beyond 2
                 └── 3' ── 4' ── 5'   epoch 2, head 5': lineage step of 4 is 2, so its lag is 3, not 1

Versions are registered in ascending order of (epoch, step), so what is older than some surviving version is a prefix of
that order, and nothing in it descends from that version. `forget_before` lets such a prefix go and makes the version
the root of what is left: memory is bounded by how far back the run can still go, not by how long it is. A forgotten
version is known to be past, whichever branch it was on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import dropwhile

from leeway.types import PolicyVersion


class Lineage:
    """The versions that have been registered, from a root on, and which of them the head descends from."""

    def __init__(self, root: PolicyVersion) -> None:
        self.root = root
        self.head = root
        self._parents: dict[PolicyVersion, PolicyVersion | None] = {root: None}
        self._lineage_steps: dict[PolicyVersion, int] = {root: root.step}
        self._discarded: set[PolicyVersion] = set()

    def __contains__(self, version: PolicyVersion) -> bool:
        return version in self._parents

    def __iter__(self) -> Iterator[PolicyVersion]:
        return iter(self._parents)

    def __len__(self) -> int:
        return len(self._parents)

    def is_unknown(self, version: PolicyVersion) -> bool:
        """Whether a version was never registered: neither is it there nor can it have been forgotten."""
        root = self.root
        is_older = version.run == root.run and (version.epoch, version.step) < (root.epoch, root.step)
        return version not in self._parents and not is_older

    def parent(self, version: PolicyVersion) -> PolicyVersion | None:
        """The version it was trained from; None for the root."""
        return self._parents[version]

    def register(self, version: PolicyVersion, parent: PolicyVersion) -> None:
        """Append a version to the head, which it becomes. Abandoned versions keep their common ancestor."""
        assert parent == self.head and version not in self._parents
        self._parents[version] = parent
        self._lineage_steps[version] = version.step
        self.head = version

    def discard_after(self, head: PolicyVersion) -> None:
        """Roll back to an ancestor of the head because a person said so: nobody wants what later versions sampled."""
        self._discarded.update(version for version in self._parents if self._lineage_steps[version] > head.step)
        self.rollback(head)

    def is_discarded(self, version: PolicyVersion) -> bool:
        """Whether an explicit rollback left this version behind."""
        return version in self._discarded

    def rollback(self, head: PolicyVersion) -> None:
        """Make a registered version the head again; what descends from it is abandoned."""
        self.head = head
        surviving = set(self.ancestry(head))
        # Parents were registered before their children.
        for version, parent in self._parents.items():
            if version in surviving:
                self._lineage_steps[version] = version.step
            else:
                assert parent is not None
                self._lineage_steps[version] = self._lineage_steps[parent]

    def forget_before(self, step: int) -> None:
        """Let every version go that was registered before the surviving one of this step, which is the root then."""
        if step <= self.root.step:
            return
        root = next(version for version in self.ancestry(self.head) if version.step == step)
        kept = dropwhile(lambda entry: entry[0] != root, self._parents.items())
        self._parents = {**dict(kept), root: None}
        self._lineage_steps = {version: self._lineage_steps[version] for version in self._parents}
        self._discarded = {version for version in self._discarded if version in self._parents}
        self.root = root

    def restore(
        self,
        parents: Mapping[PolicyVersion, PolicyVersion | None],
        discarded: Iterable[PolicyVersion],
        head: PolicyVersion,
    ) -> None:
        """Become the tree that `parents` describes, each version after its parent."""
        self._parents = dict(parents)
        self.root = next(iter(self._parents))
        self._lineage_steps.clear()
        self._discarded = set(discarded)
        self.rollback(head)

    def ancestry(self, version: PolicyVersion) -> Iterator[PolicyVersion]:
        """The version, its parent, and so on to the root."""
        at: PolicyVersion | None = version
        while at is not None:
            yield at
            at = self._parents[at]

    def lineage_step(self, version: PolicyVersion) -> int:
        """Step of the common ancestor of a registered version and the head."""
        return self._lineage_steps[version]

    def is_abandoned(self, version: PolicyVersion) -> bool:
        """Whether the head descends from another branch; not so for what has been forgotten."""
        return version in self._parents and not self.survives(version)

    def survives(self, version: PolicyVersion) -> bool:
        """Whether the head is this version or descends from it."""
        return self._lineage_steps.get(version) == version.step
