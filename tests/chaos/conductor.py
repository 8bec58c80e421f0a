"""One run of the rehearsal under fire, and many of them on one buffer.

    conductor ── forks ──> replay buffer, learner, two servers, oracle (with the proxies between them)
        ▲  │ strikes: kill -9 and loss of power, of one process or of all; SIGSTOP, SIGCONT
        │  └── a crash point is armed in the oracle ── hit, or its deadline ──> strike ──> go ──> the next one
        │  turns dials: wall clocks jump, the buffer's disk fills up and gets space back
        └── ends of processes, the oracle's lines, deadlines: one selector, no thread

A process that dies is started again at once. When a run has taken its strikes the faults end, and it must finish: each
step has a deadline (invariant 12), and no process may refuse to start.

Runs share one buffer, except those with retention: what they retire is archived, and judged, run by run.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any, Final

from leeway.service.process import EXIT_OK, EXIT_REFUSED
from tests.chaos.archive import install_archive
from tests.chaos.dial import Dial, Room, install_clock, install_disk
from tests.chaos.fleet import Child, Program, lose_power
from tests.chaos.oracle_process import Scene, run_oracle
from tests.chaos.plan import BUFFER, LEARNER, SERVERS, Plan, Tally
from tests.chaos.scenery import Places, configure, described, services
from tests.chaos.stage import Stage

ORACLE: Final = "oracle"
_START_SECONDS: Final = 120.0
_STOP_SECONDS: Final = 120.0
_JUDGE_SECONDS: Final = 180.0
_RUN_SECONDS: Final = 600.0
"""One run, whatever happens."""
_MAX_DEATHS: Final = 25
"""Times that processes may end by themselves without a step before that counts as going round in circles."""


def conduct(plan: Plan, say: Callable[[str], None]) -> Tally:
    """Runs until the kills are reached, or something is violated."""
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
        self._retention = self._rng.choice(plan.retentions)
        self._places = Places.make(plan.directory.resolve(), self.name, own_buffer=bool(self._retention))
        self._dials = {name: Dial(self._places.dial(name)) for name in (BUFFER, LEARNER, *SERVERS)}
        self._stage = Stage(self._on_end)
        self._programs: dict[str, Program] = {}
        self._deaths = 0
        self._kills_left = min(plan.kills_per_run, plan.kills - tally.kills.total())
        self._struck: Callable[[], None] | None = None  # the strike that is armed
        self._strike_number = 0
        self._calm = False
        self._step = 0
        self._progress = 0
        self._finished = False
        self._given_up = False
        self._verdict: dict[str, Any] | None = None
        self._over = False
        configuration = configure(plan, self._places, self._retention, self._rng)
        self.described = described(configuration, self._retention)
        self._real = configuration.network
        ours, theirs = socket.socketpair()
        self._oracle, self._unread = ours, b""
        scene = Scene(
            seed=f"{plan.seed}/{number}",
            run=self.name,
            run_directory=self._places.run_directory,
            learner_ledger=self._places.ledger(LEARNER),
            log_directory=self._places.buffer_disk / "replay",
            archive=self._places.archive,
            replay_buffer=self._real.replay_buffer,
            policy=self._real.policy,
            earlier_run="" if self._retention else earlier,
            climate=plan.climate,
        )
        self._stage.listen(ours, self._read_oracle)
        self._configuration = configuration
        self._programs[ORACLE] = Program(ORACLE, partial(run_oracle, scene, theirs), (), self._places.log(ORACLE))

    # The play

    def play(self) -> None:
        """From the first process to the verdict."""
        ends_at = time.monotonic() + _RUN_SECONDS
        self._start(ORACLE)
        self._stage.at(_START_SECONDS, partial(self._give_up, "the oracle did not start"))
        while not self._over:
            if time.monotonic() > ends_at:
                self._tally.violations.append(f"12: no end within {_RUN_SECONDS:g} s: {self._blockers()} ({self.name})")
                return
            self._stage.turn()

    def _start(self, name: str) -> None:
        if (self._finished and name in SERVERS) or (self._given_up and name != BUFFER):
            return
        if not self._over:
            self._stage.start(self._programs[name])

    def _on_end(self, child: Child, code: int) -> None:
        """A process ended by itself."""
        if self._over:
            return
        name = child.program.name
        if name == ORACLE:
            self._give_up(f"the oracle ended with code {code}: {child.last_line()}")
        elif code == EXIT_OK and name == LEARNER:
            self._on_finished()
        elif name in SERVERS and (self._finished or code == EXIT_OK):
            if self._finished and not any(server in self._stage.children for server in SERVERS):
                self._last_restart()
        elif code == EXIT_REFUSED:
            self._give_up(f"12: {name} refuses to go on: {child.last_line()}", blind=name == BUFFER)
        else:
            self._deaths += 1
            self._tally.faults["died by itself"] += 1
            if self._deaths > _MAX_DEATHS:
                problem = f"12: {name} ends again and again, with code {code}: {child.last_line()}"
                self._give_up(problem, blind=name == BUFFER)
            self._stage.at(0.1, partial(self._start, name))

    def _give_up(self, problem: str, *, blind: bool = False) -> None:
        self._tally.violations.append(f"{'' if problem.startswith('12') else '12: '}{problem} ({self.name})")
        if self._given_up or ORACLE not in self._stage.children:
            self._over = True
            return
        # What can be said of a run that does not end is said all the same.
        self._given_up = True
        for name in (LEARNER, *SERVERS):
            self._stage.kill(name)
        if blind:
            self._tell(judge="blind")
        else:
            self._last_restart()

    def _give_up_for_good(self, problem: str) -> None:
        self._given_up = True
        self._give_up(problem)

    # The oracle's lines

    def _tell(self, **message: object) -> None:
        self._oracle.sendall(json.dumps(message).encode() + b"\n")

    def _read_oracle(self) -> None:
        if self._over:
            return
        data = self._oracle.recv(1 << 16)
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            match json.loads(line):
                case {"ready": addresses}:
                    self._on_ready(addresses)
                case {"hit": event}:
                    self._strike_now(event)
                case {"step": int(step)}:
                    self._step = max(self._step, step)
                    self._progress += 1
                    self._deaths = 0
                case {"verdict": verdict}:
                    self._on_verdict(verdict)
                case other:
                    raise AssertionError(other)

    def _on_ready(self, proxies: dict[str, str]) -> None:
        self._stage.forget_deadlines()
        replace(self._configuration, network=self._real.model_copy(update=proxies)).write(self._places.config)
        for program in services(self._places, self._real):
            self._programs[program.name] = replace(program, before=partial(self._before, program.name))
            self._start(program.name)
        self._next_strike()

    def _before(self, name: str) -> None:
        """In the process: what it does before it is itself."""
        install_clock(self._dials[name])
        if name == BUFFER:
            install_disk(self._dials[name], Random(f"{self._plan.seed}/{self.name}/{os.getpid()}"))
            if self._places.archive is not None:
                install_archive(self._places.archive)
        plant = self._plan.plant(name)
        if plant is not None:
            plant()

    # Strikes

    def _next_strike(self) -> None:
        if self._kills_left <= 0 or self._finished or self._given_up:
            self._end_faults()
            return
        rng, plan = self._rng, self._plan
        victim = rng.choices([name for name, _ in plan.victims], [weight for _, weight in plan.victims])[0]
        event, most = rng.choice(plan.events)
        victims = [BUFFER, LEARNER, *SERVERS] if victim == "all" else [victim]
        stop = victim != "all" and rng.random() < plan.stops
        self._strike_number += 1
        self._struck = partial(self._stop if stop else self._kill, victims)
        self._tell(arm={"event": event, "count": rng.randint(1, most)})
        self._stage.at(self._plan.strike_seconds, partial(self._strike_late, self._strike_number))

    def _strike_late(self, number: int) -> None:
        if number == self._strike_number:
            self._strike_now("")

    def _strike_now(self, event: str) -> None:
        if self._struck is None or self._finished or self._given_up:
            self._tell(go=True)
            return
        self._tally.faults["crash points" if event else "crash times"] += 1
        strike, self._struck = self._struck, None
        strike()
        if self._rng.random() < self._plan.rollbacks:
            self._tally.faults["returned to a checkpoint"] += 1
            self._tell(rollback=True)
        if self._rng.random() < self._plan.hardships:
            self._hardship()
        self._tell(go=True)
        self._strike_number += 1
        self._stage.at(self._rng.random() * 0.6, self._next_strike)

    def _kill(self, victims: Sequence[str]) -> None:
        for name in victims:
            if self._stage.kill(name):
                self._tally.kills[name] += 1
                self._kills_left -= 1
        for name in victims:  # when all of them are dead
            self._tally.losses.add(lose_power(self._programs[name], self._rng, merciless=self._plan.merciless))
            self._stage.at(self._rng.random() * 0.3, partial(self._start, name))

    def _hardship(self) -> None:
        rng = self._rng
        if rng.random() < 0.5:
            self._tally.faults["clocks jumped"] += 1
            offset_seconds = rng.choice((1.0, 1000.0)) * rng.uniform(-7200.0, 7200.0)
            self._dials[rng.choice(sorted(self._dials))].set_clock(offset_seconds)
            return
        room = rng.choice((Room.SCARCE, Room.FULL))
        self._tally.faults[f"disk {room.name.lower()}"] += 1
        self._dials[BUFFER].set_room(room)
        self._stage.at(rng.uniform(0.2, 2.5), partial(self._dials[BUFFER].set_room, Room.PLENTY))

    def _stop(self, victims: Sequence[str]) -> None:
        for name in victims:
            child = self._stage.children.get(name)
            if child is None or child.stopped:
                continue
            child.signal(signal.SIGSTOP)
            self._tally.faults["stopped"] += 1
            self._stage.at(self._rng.uniform(0.05, 2.5), partial(self._continue, child))

    def _continue(self, child: Child) -> None:
        if self._stage.children.get(child.program.name) is child:
            child.signal(signal.SIGCONT)

    # The end

    def _end_faults(self) -> None:
        self._calm = True
        self._dials[BUFFER].set_room(Room.PLENTY)
        self._tell(calm=True)
        self._expect_progress()

    def _expect_progress(self) -> None:
        self._stage.at(self._plan.step_seconds, partial(self._check_progress, self._progress))

    def _check_progress(self, before: int) -> None:
        if self._finished or self._given_up:
            return
        if self._progress == before:
            seconds = self._plan.step_seconds
            self._give_up(f"12: no step within {seconds:g} s after step {self._step}: {self._blockers()}")
        self._expect_progress()

    def _blockers(self) -> str:
        return "; ".join(f"{name}: {child.last_line()}" for name, child in self._stage.children.items())

    def _on_finished(self) -> None:
        self._finished = True
        self._tell(calm=True)
        for name, child in self._stage.children.items():
            child.signal(signal.SIGCONT)
            if name in SERVERS:
                child.signal(signal.SIGTERM)  # one that has just joined waits for a learner, and there will be none
        self._stage.at(_STOP_SECONDS, self._servers_must_have_ended)
        if not any(server in self._stage.children for server in SERVERS):
            self._last_restart()

    def _servers_must_have_ended(self) -> None:
        if self._verdict is None and any(server in self._stage.children for server in SERVERS):
            self._give_up(f"12: a server goes on after the end: {self._blockers()}")

    def _last_restart(self) -> None:
        """What is judged is what a loss of power leaves."""
        self._kills_left = 0
        self._dials[BUFFER].set_room(Room.PLENTY)
        if self._stage.kill(BUFFER):
            self._tally.losses.add(lose_power(self._programs[BUFFER], self._rng, merciless=self._plan.merciless))
        self._tell(calm=True)
        self._start(BUFFER)
        self._tell(judge="finished" if self._finished else "unfinished")
        self._stage.at(_JUDGE_SECONDS, partial(self._give_up_for_good, "the buffer could not be exported"))

    def _on_verdict(self, verdict: dict[str, Any]) -> None:
        self._verdict = verdict
        self._tally.violations += [f"{line} ({self.name})" for line in verdict["violations"]]
        self._tally.faults.update(verdict["faults"])
        self._tally.checked.update(verdict["counts"])
        self._over = True

    def end(self) -> None:
        """Leave no process behind."""
        self._over = True
        self._stage.close()
        self._oracle.close()
