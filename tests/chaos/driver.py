"""One chaos run, and many of them on one buffer.

    driver ── starts ──> replay buffer, learner, two servers, judge (with the proxies between them)
      ▲  │ kills: SIGKILL and loss of power, of one process or of all; or SIGSTOP, SIGCONT
      │  └── a crash point is armed in the judge ── hit, or its deadline ──> kill ──> go ──> the next one
      │  sets fault controls: wall clocks jump, the buffer's disk fills up and gets space back
      └── ends of processes, the judge's messages, deadlines: one selector, no thread

A process that dies is started again at once. When a run has had its kills the faults end, and it must finish: each step
has a deadline (invariant 12), and no process may refuse to start.

Runs share one buffer, except those with retention: what they retire is archived, and judged, run by run.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from random import Random
from typing import Any, Final

from leeway.service.process import EXIT_OK, EXIT_REFUSED
from tests.chaos.fault_controls import FaultControls, Space
from tests.chaos.judge_process import Scope, judge_run
from tests.chaos.plan import BUFFER, LEARNER, SERVERS, Plan, Tally
from tests.chaos.programs import Program, lose_power
from tests.chaos.scheduler import Scheduler
from tests.chaos.workspace import Workspace, configure, described, services
from tests.harness.processes import Child, Message, preload

JUDGE: Final = "judge"
_START_SECONDS: Final = 120.0
_STOP_SECONDS: Final = 120.0
_JUDGE_SECONDS: Final = 180.0
_RUN_SECONDS: Final = 600.0
"""The longest that one run may take, whatever happens."""
_MAX_DEATHS: Final = 25
"""Times that processes may end by themselves without a step; more of them is a loop without progress."""


def drive(plan: Plan, say: Callable[[str], None]) -> Tally:
    """Run until the kills are reached, or something is violated."""
    preload("tests.chaos.programs", "tests.chaos.judge_process")
    tally = Tally()
    earlier = ""
    while tally.kills.total() < plan.kills and not tally.violations:
        run = _Run(plan, tally, tally.runs, earlier)
        try:
            run.play()
        finally:
            run.end()
        tally.runs += 1
        earlier = run.name
        say(f"{run.name}: {run.described}; {tally.kills.total()} of {plan.kills} kills")
    return tally


class _Run:
    def __init__(self, plan: Plan, tally: Tally, number: int, earlier: str) -> None:
        self.name = f"chaos-{number}"
        self._plan = plan
        self._tally = tally
        self._rng = Random(f"{plan.seed}/{number}")
        retention = self._rng.choice(plan.retentions)
        self._workspace = workspace = Workspace.make(plan.directory.resolve(), self.name, own_buffer=bool(retention))
        self._controls = {name: FaultControls(workspace.controls(name)) for name in (BUFFER, LEARNER, *SERVERS)}
        self._scheduler = Scheduler(self._on_end, self._on_message)
        self._programs: dict[str, Program] = {}
        self._deaths = 0
        self._kills_left = min(plan.kills_per_run, plan.kills - tally.kills.total())
        self._armed: Callable[[], None] | None = None  # the kill that waits for its crash point
        self._kill_number = 0
        self._step = 0
        self._progress = 0
        self._finished = False
        self._given_up = False
        self._verdict: dict[str, Any] | None = None
        self._over = False
        configuration = configure(plan, workspace, retention, self._rng)
        self.described = described(configuration, retention)
        self._real = configuration.network
        self._configuration = configuration
        scope = Scope(
            seed=f"{plan.seed}/{number}",
            run=self.name,
            run_directory=workspace.run_directory,
            learner_ledger=workspace.ledger(LEARNER),
            log_directory=workspace.buffer_disk / "replay",
            archive=workspace.archive,
            replay_buffer=self._real.replay_buffer,
            policy=self._real.policy,
            earlier_run="" if retention else earlier,
            rates=plan.rates,
        )
        self._programs[JUDGE] = Program(JUDGE, judge_run, (scope,), workspace.log(JUDGE))

    # The run

    def play(self) -> None:
        """From the first process to the verdict."""
        ends_at = time.monotonic() + _RUN_SECONDS
        self._start(JUDGE)
        self._scheduler.at(_START_SECONDS, partial(self._give_up, "the judge did not start"))
        while not self._over:
            if time.monotonic() > ends_at:
                self._tally.violations.append(f"12: no end within {_RUN_SECONDS:g} s: {self._blockers()} ({self.name})")
                return
            self._scheduler.turn()

    def _start(self, name: str) -> None:
        if (self._finished and name in SERVERS) or (self._given_up and name != BUFFER):
            return
        if not self._over:
            self._scheduler.start(self._programs[name])

    def _on_end(self, name: str, code: int, last_line: str) -> None:
        """A process ended by itself."""
        if self._over:
            return
        if name == JUDGE:
            self._give_up(f"the judge ended with code {code}: {last_line}")
        elif code == EXIT_OK and name == LEARNER:
            self._on_finished()
        elif name in SERVERS and (self._finished or code == EXIT_OK):
            if self._finished and not self._servers_live():
                self._last_restart()
        elif code == EXIT_REFUSED:
            self._give_up(f"12: {name} refuses to go on: {last_line}", blind=name == BUFFER)
        else:
            self._deaths += 1
            self._tally.faults["died by itself"] += 1
            if self._deaths > _MAX_DEATHS:
                problem = f"12: {name} ends again and again, with code {code}: {last_line}"
                self._give_up(problem, blind=name == BUFFER)
            self._scheduler.at(0.1, partial(self._start, name))

    def _give_up(self, problem: str, *, blind: bool = False) -> None:
        self._tally.violations.append(f"{'' if problem.startswith('12') else '12: '}{problem} ({self.name})")
        if self._given_up or JUDGE not in self._scheduler.children:
            self._over = True
            return
        # A run that does not end is judged all the same, as far as it came.
        self._given_up = True
        for name in (LEARNER, *SERVERS):
            self._scheduler.kill(name)
        if blind:
            self._tell(judge="blind")
        else:
            self._last_restart()

    def _give_up_finally(self, problem: str) -> None:
        self._given_up = True
        self._give_up(problem)

    # The judge's messages

    def _tell(self, **message: object) -> None:
        if JUDGE in self._scheduler.children:
            self._scheduler.children[JUDGE].send(**message)

    def _on_message(self, message: Message) -> None:
        if self._over:
            return
        match message:
            case {"ready": addresses}:
                self._on_ready(addresses)
            case {"hit": event}:
                self._kill_now(event)
            case {"step": int(step)}:
                self._step = max(self._step, step)
                self._progress += 1
                self._deaths = 0
            case {"verdict": verdict}:
                self._on_verdict(verdict)
            case other:
                raise AssertionError(other)

    def _on_ready(self, proxies: dict[str, str]) -> None:
        self._scheduler.forget_deadlines()
        network = self._real.model_copy(update=proxies)
        self._configuration.model_copy(update={"network": network}).write(self._workspace.config)
        for program in services(self._workspace, self._real, self._plan):
            self._programs[program.name] = program
            self._start(program.name)
        self._next_kill()

    # Kills

    def _next_kill(self) -> None:
        if self._kills_left <= 0 or self._finished or self._given_up:
            self._end_faults()
            return
        rng, plan = self._rng, self._plan
        victim = rng.choices([name for name, _ in plan.victims], [weight for _, weight in plan.victims])[0]
        event, most = rng.choice(plan.events)
        victims = [BUFFER, LEARNER, *SERVERS] if victim == "all" else [victim]
        stop = victim != "all" and rng.random() < plan.stops
        self._kill_number += 1
        self._armed = partial(self._stop if stop else self._kill, victims)
        self._tell(arm={"event": event, "count": rng.randint(1, most)})
        self._scheduler.at(self._plan.kill_seconds, partial(self._kill_without_event, self._kill_number))

    def _kill_without_event(self, number: int) -> None:
        if number == self._kill_number:
            self._kill_now("")

    def _kill_now(self, event: str) -> None:
        if self._armed is None or self._finished or self._given_up:
            self._tell(go=True)
            return
        self._tally.faults["crash points" if event else "crash times"] += 1
        kill, self._armed = self._armed, None
        kill()
        if self._rng.random() < self._plan.rollbacks:
            self._tally.faults["returned to a checkpoint"] += 1
            self._tell(rollback=True)
        if self._rng.random() < self._plan.clock_and_disk:
            self._clock_or_disk()
        self._tell(go=True)
        self._kill_number += 1
        self._scheduler.at(self._rng.random() * 0.6, self._next_kill)

    def _kill(self, victims: Sequence[str]) -> None:
        for name in victims:
            if self._scheduler.kill(name):
                self._tally.kills[name] += 1
                self._kills_left -= 1
        for name in victims:  # when all of them are dead
            self._lose_power(name)
            self._scheduler.at(self._rng.random() * 0.3, partial(self._start, name))

    def _lose_power(self, name: str) -> None:
        self._tally.losses.add(lose_power(self._programs[name], self._rng, lose_all=self._plan.lose_all))

    def _clock_or_disk(self) -> None:
        rng = self._rng
        if rng.random() < 0.5:
            self._tally.faults["clocks jumped"] += 1
            offset_seconds = rng.choice((1.0, 1000.0)) * rng.uniform(-7200.0, 7200.0)
            self._controls[rng.choice(sorted(self._controls))].set_clock(offset_seconds)
            return
        space = rng.choice((Space.SCARCE, Space.FULL))
        self._tally.faults[f"disk {space.name.lower()}"] += 1
        self._controls[BUFFER].set_space(space)
        self._scheduler.at(rng.uniform(0.2, 2.5), partial(self._controls[BUFFER].set_space, Space.PLENTY))

    def _stop(self, victims: Sequence[str]) -> None:
        for name in victims:
            child = self._scheduler.children.get(name)
            if child is None or child.stopped:
                continue
            child.signal(signal.SIGSTOP)
            self._tally.faults["stopped"] += 1
            self._scheduler.at(self._rng.uniform(0.05, 2.5), partial(self._continue, name, child))

    def _continue(self, name: str, child: Child) -> None:
        if self._scheduler.children.get(name) is child:
            child.signal(signal.SIGCONT)

    # The end

    def _end_faults(self) -> None:
        self._controls[BUFFER].set_space(Space.PLENTY)
        self._tell(end_faults=True)
        self._expect_progress()

    def _expect_progress(self) -> None:
        self._scheduler.at(self._plan.step_seconds, partial(self._check_progress, self._progress))

    def _check_progress(self, before: int) -> None:
        if self._finished or self._given_up:
            return
        if self._progress == before:
            seconds = self._plan.step_seconds
            self._give_up(f"12: no step within {seconds:g} s after step {self._step}: {self._blockers()}")
        self._expect_progress()

    def _blockers(self) -> str:
        return "; ".join(f"{name}: {child.last_line()}" for name, child in self._scheduler.children.items())

    def _servers_live(self) -> bool:
        return any(server in self._scheduler.children for server in SERVERS)

    def _on_finished(self) -> None:
        self._finished = True
        self._tell(end_faults=True)
        for name, child in self._scheduler.children.items():
            child.signal(signal.SIGCONT)
            if name in SERVERS:
                child.signal(signal.SIGTERM)  # one that has just joined waits for a learner, and there will be none
        self._scheduler.at(_STOP_SECONDS, self._servers_must_have_ended)
        if not self._servers_live():
            self._last_restart()

    def _servers_must_have_ended(self) -> None:
        if self._verdict is None and self._servers_live():
            self._give_up(f"12: a server goes on after the end: {self._blockers()}")

    def _last_restart(self) -> None:
        """Judge what is left after a loss of power."""
        self._kills_left = 0
        self._controls[BUFFER].set_space(Space.PLENTY)
        if self._scheduler.kill(BUFFER):
            self._lose_power(BUFFER)
        self._tell(end_faults=True)
        self._start(BUFFER)
        self._tell(judge="finished" if self._finished else "unfinished")
        self._scheduler.at(_JUDGE_SECONDS, partial(self._give_up_finally, "the buffer could not be exported"))

    def _on_verdict(self, verdict: dict[str, Any]) -> None:
        self._verdict = verdict
        self._tally.violations += [f"{line} ({self.name})" for line in verdict["violations"]]
        self._tally.faults.update(verdict["faults"])
        self._tally.checked.update(verdict["counts"])
        self._over = True

    def end(self) -> None:
        """Kill every process that is left."""
        self._over = True
        self._scheduler.close()
