"""Planted bugs, put into a process before it starts: the chaos suite must find each, by an invariant it breaks.

Each replaces one function by which a service decides with one that a careless author might have written.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import replay_buffer.buffer
import replay_buffer.storage.directory
from learner.loop.checkpointing import Checkpointing
from learner.run_artifacts.checkpoint import PendingCheckpoint
from learner.trainer import FinishSave
from leeway.types import PolicyVersion, WriteItem
from replay_buffer.rules.admission import Admission
from replay_buffer.rules.state import RunState
from replay_buffer.storage.index_file import oldest_segment
from replay_buffer.storage.segments import AppendFile
from tests.chaos.network_faults import USUAL_FAULTS
from tests.chaos.plan import BUFFER, LEARNER, RETENTIONS, SERVERS, Plan


def acknowledge_before_fsync() -> None:
    """What is written counts as on disk."""
    AppendFile.sync = lambda _: None  # type: ignore[method-assign]


def commit_before_checkpoint() -> None:
    """The buffer is told of a checkpoint that is still to be written."""

    async def commit(
        self: Checkpointing, epoch: int, pending: PendingCheckpoint, finish_save: FinishSave, began: float
    ) -> None:
        step = pending.version.step
        await self._context.answered(self._context.buffer.commit(epoch, step))
        self._ledger = [entry for entry in self._ledger if entry[0] > step]
        finish_save()
        await asyncio.to_thread(self._context.checkpoints.finish, pending)

    Checkpointing._commit = commit  # type: ignore[method-assign]


def no_attempt_check() -> None:
    """Whatever attempt an item names, it is taken for the newest."""
    decide = replay_buffer.buffer.decide_write

    def careless(run: RunState, item: WriteItem, *rest: Any, **more: Any) -> Any:
        found = run.find(item.trajectory_id)
        attempt = item.attempt if found is None else found[0].members[found[1]].attempt
        decision = decide(run, item._replace(attempt=attempt), *rest, **more)
        return decision._replace(result=decision.result._replace(attempt=item.attempt))

    replay_buffer.buffer.decide_write = careless


def no_epoch_check() -> None:
    """Any learner may go on."""
    _everywhere("check_epoch", lambda run, epoch: None)


def leaked_reservation() -> None:
    """A place is taken when a group is issued and given back when it is trained on; nobody thought of drops."""
    init = Admission.__init__

    def leaking(self: Any, run: RunState, *rest: Any) -> None:
        init(self, run, *rest)
        self._by_deadline[run.head.step] += run.dropped.total()

    Admission.__init__ = leaking  # type: ignore[method-assign]


def staleness_by_subtraction() -> None:
    """A version is as old as the number of its step says, whatever became of its branch."""

    def deadline_of(run: RunState, versions: Iterable[PolicyVersion]) -> int:
        return min(run.spec.max_staleness + version.step for version in versions)

    _everywhere("deadline_of", deadline_of)


def write_on_a_full_disk() -> None:
    """Nobody looks at what a write says."""
    write = AppendFile.write

    def careless(self: AppendFile, blocks: Sequence[bytes | memoryview]) -> int:
        with suppress(OSError):
            write(self, blocks)
        return sum(map(len, blocks))

    AppendFile.write = careless  # type: ignore[method-assign]


def retire_what_is_kept() -> None:
    """What has ended is of no use to anyone."""

    def newest_live(states: Iterable[RunState], index: Any, newest: int) -> int:
        del index
        groups = [group for state in states for group in state.groups.unended.values()]
        return min([newest, *(oldest_segment(group) or newest for group in groups)])

    replay_buffer.storage.directory.first_needed = newest_live


def _everywhere(name: str, value: object) -> None:
    """Replace a function in every module of the buffer that knows it."""
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("replay_buffer.") and hasattr(module, name):
            setattr(module, name, value)


@dataclass(frozen=True)
class Bug:
    """A bug, its process, the invariants of which it must break one, and the plan that brings it out.

    A fault has to meet the bug, which a seed makes likely, not certain: the timing of processes is not seeded. Where
    the plan makes it certain, one seed has to do.
    """

    install: Callable[[], None]
    process: str
    invariants: tuple[int, ...]
    plan: Plan
    certain: bool = False

    def planted(self, name: str, seed: int, directory: Path) -> Plan:
        """A short suite with the bug in it."""
        return replace(self.plan, seed=seed, directory=directory, bug=name, bug_process=self.process)


_SHORT = Plan(seed=0, kills=8, directory=Path(), kills_per_run=8, steps=14, stops=0.0)
_MET = replace(_SHORT, kill_seconds=60.0)
"""The run goes on with the bug in it, so its crash points come, however slowly."""
_STUCK_SECONDS = 8.0
"""A run with the bug may come to a halt, which is looked for no longer than this."""
_REPEATING = replace(USUAL_FAULTS, repeated=0.6, longest_repetition_seconds=2.0)
_ADVANCES = (("Advance.ended", 3), ("DrawBatch.ended", 3))
_REWINDING = ("learner.checkpoint_every_steps=4", "run.max_staleness=1", "evaluation.every_steps=0")
_KEEPING = ("learner.keep_checkpoints=100", "learner.checkpoint_every_steps=4")

BUGS = {
    "acknowledge-before-fsync": Bug(
        acknowledge_before_fsync,
        BUFFER,
        (1,),
        # Whatever the buffer wrote since its last start is lost when the power goes, at the latest after the end.
        replace(
            _SHORT,
            step_seconds=_STUCK_SECONDS,
            victims=((BUFFER, 1.0),),
            events=(("write.answered", 30),),
            kills=1,
            lose_all=True,
        ),
        certain=True,
    ),
    "commit-before-checkpoint": Bug(
        commit_before_checkpoint, LEARNER, (8,), replace(_SHORT, victims=((LEARNER, 1.0),), kills=1)
    ),
    "no-attempt-check": Bug(
        no_attempt_check,
        BUFFER,
        (6, 7),
        replace(
            _MET,
            victims=((SERVERS[0], 1.0), (SERVERS[1], 1.0)),
            events=(("write.sent", 20),),
            rates=replace(_REPEATING, longest_repetition_seconds=1.0),
            # Slow tokens: a new attempt has written nothing yet when the old one's items arrive.
            overrides=(
                "inference_server.arithmetic.token_seconds=0.02",
                "inference_server.arithmetic.chunk_tokens=4",
                "run.members=2",
            ),
        ),
    ),
    "no-epoch-check": Bug(
        no_epoch_check,
        BUFFER,
        (7,),
        replace(_MET, victims=((LEARNER, 1.0),), events=_ADVANCES, rates=_REPEATING, kills=4),
    ),
    "leaked-reservation": Bug(
        leaked_reservation,
        BUFFER,
        (12,),
        replace(_SHORT, step_seconds=_STUCK_SECONDS, victims=((LEARNER, 1.0),), events=_ADVANCES, overrides=_REWINDING),
    ),
    "write-on-a-full-disk": Bug(
        write_on_a_full_disk,
        BUFFER,
        (1, 12),
        replace(
            _SHORT,
            step_seconds=_STUCK_SECONDS,
            victims=((BUFFER, 1.0), (SERVERS[0], 2.0)),
            events=(("write.sent", 20),),
            clock_and_disk=1.0,
            steps=30,
        ),
    ),
    "retire-what-is-kept": Bug(
        retire_what_is_kept,
        BUFFER,
        (11, 12),
        replace(
            _SHORT,
            step_seconds=_STUCK_SECONDS,
            victims=((BUFFER, 1.0),),
            kills=2,
            steps=30,
            retentions=(RETENTIONS[1],),
            overrides=_KEEPING,
        ),
    ),
    "staleness-by-subtraction": Bug(
        staleness_by_subtraction,
        BUFFER,
        (5,),
        replace(_MET, victims=((LEARNER, 1.0),), events=_ADVANCES, overrides=_REWINDING),
    ),
}
