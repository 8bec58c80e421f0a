"""What must hold of every version and of everything that is served, whoever dies: its own account, kept outside.

A version is registered before anyone can know it, under its epoch and step, once and for all. An engine serves only
registered versions, each time the bytes of its label; incarnations of the learner that it follows never go back, and
within one the steps never do.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from leeway.types import PolicyVersion
from tests.harness.weights_engine import WeightsEngine


@dataclass
class Outcome:
    """What was seen."""

    pushes: int = 0
    looks: int = 0
    kinds: Counter[str] = field(default_factory=Counter[str])
    violations: list[str] = field(default_factory=list[str])


class Oracle:
    """Looks at engines and at what the learner says of its versions."""

    def __init__(self, outcome: Outcome) -> None:
        self._outcome = outcome
        self._digests: dict[tuple[int, int], bytes] = {}
        self._highest_epoch = 0
        self._served: set[tuple[str, PolicyVersion]] = set()
        self._newest: dict[str, tuple[int, int]] = {}

    def registered(self, version: PolicyVersion, publisher_epoch: int) -> None:
        """The learner of this epoch is about to publish a version."""
        name = version.epoch, version.step
        if self._digests.setdefault(name, version.digest) != version.digest:
            self._outcome.violations.append(f"epoch {name[0]}, step {name[1]} names two versions")
        if publisher_epoch < self._highest_epoch or version.epoch > publisher_epoch:
            self._outcome.violations.append(f"a learner of epoch {publisher_epoch} publishes {version}")
        self._highest_epoch = max(self._highest_epoch, publisher_epoch)

    def look(self, name: str, engine: WeightsEngine) -> None:
        """At what an engine serves at this moment."""
        if engine.label is None or engine.paused:
            return
        self._outcome.looks += 1
        self._served.add((name, engine.label))
        if not engine.looks_right():
            self._outcome.violations.append(f"{name} serves other weights than its label {engine.label}")
        now = engine.publisher_epoch, engine.label.step
        if now < self._newest.get(name, (0, 0)):
            self._outcome.violations.append(f"{name} went back to {engine.label} of publisher epoch {now[0]}")
        self._newest[name] = now

    def end(self) -> None:
        """Everything that was said has been heard: whatever was served must have been registered."""
        for name, version in self._served:
            if self._digests.get((version.epoch, version.step)) != version.digest:
                self._outcome.violations.append(f"{name} served {version}, which was never registered")
