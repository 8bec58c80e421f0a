"""Takes servers out of the run that diverge or are slow, and names them.

    a step is trained ──> its tokens' mismatch, by server ───────┐
                                                                 ├──> verdicts ──> DrainServer ──> the buffer acts and
    check_seconds pass ──> how long tickets take, by the buffer ─┘                                 tells the server

    who measures    `fleet.mismatch`, and the buffer      who decides    this module, or a person (`leeway fleet`)
    waits for       a step, or its own clock              unblocks       nobody; training never waits for it

The buffer has the last word: the last server of a run stays, as a suspect in log and metrics. A server that was drained
is judged on new samples once it is readmitted.
"""

from __future__ import annotations

import asyncio
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from learner.fleet.mismatch import MismatchWindow, Standing, samples_of
from learner.lineage import Branch
from leeway.config import FleetOptions
from leeway.errors import DeadlineError, ExhaustedError, LeewayError, PreconditionError, UnavailableError
from leeway.replay_client import ReplayClient
from leeway.service.metrics import LearnerMetrics
from leeway.types import DrainReason, Float32Array, ServerStatus, TrajectoryGroup

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A server to drain, and why."""

    server_id: str
    reason: DrainReason
    message: str


class FleetWatch:
    """Judges the servers of a run, for one incarnation of its learner.

    Args:
        buffer: acts.
        options: what counts as diverging and slow.
        metrics: shows mismatch and suspects.
        on_drained: is told of each server that was taken out.
    """

    def __init__(
        self,
        buffer: ReplayClient,
        options: FleetOptions,
        metrics: LearnerMetrics,
        on_drained: Callable[[Verdict], None],
    ) -> None:
        self._buffer = buffer
        self._options = options
        self._metrics = metrics
        self._on_drained = on_drained
        self._window = MismatchWindow(options.window_steps)
        self._trained = asyncio.Event()
        self._named: set[tuple[str, DrainReason]] = set()  # suspects that the log has named
        self._shown: set[str] = set()  # servers with a metric

    def trained(
        self,
        groups: Sequence[TrajectoryGroup],
        policy_logprobs: Mapping[str, Float32Array],
        head_step: int,
        branches: Sequence[Branch],
    ) -> None:
        """A step was trained on these groups, from the policy of `head_step`."""
        self._window.add(
            sample
            for group in groups
            for trajectory in group.trajectories
            if trajectory.trajectory_id in policy_logprobs
            for sample in samples_of(trajectory, policy_logprobs[trajectory.trajectory_id], head_step, branches)
        )
        self._trained.set()

    async def run(self, epoch: int) -> None:
        """Judge the servers after each step, at least every check_seconds; runs until cancelled."""
        while True:
            try:
                async with asyncio.timeout(self._options.check_seconds):
                    await self._trained.wait()
            except TimeoutError:
                pass  # check_seconds have passed
            self._trained.clear()
            try:
                await self.check(epoch)
            except (UnavailableError, DeadlineError, ExhaustedError) as error:
                log.info("the servers are not looked at: %s", error.message)
            except LeewayError as error:  # fenced, or a buffer that does not know the call
                log.warning("the servers are no longer looked at: %s", error.message)
                return

    async def check(self, epoch: int) -> None:
        """Judge the servers once, and drain those with a verdict."""
        servers = await self._buffer.servers()
        self._window.forget(server.server_id for server in servers if server.drained is not None)
        standings = self._window.standings(self._options.min_tokens)
        self._show(standings)
        suspects = 0
        for verdict in verdicts(standings, servers, self._options):
            suspects += not await self._drained(verdict, epoch)
        self._metrics.suspect_servers.set(suspects)

    async def _drained(self, verdict: Verdict, epoch: int) -> bool:
        """Ask the buffer to drain the server; false where it stays, as a suspect."""
        if not self._options.drain:
            self._name(verdict, "learner.fleet.drain is off")
            return False
        try:
            await self._buffer.drain_server(verdict.server_id, verdict.reason, verdict.message, epoch=epoch)
        except PreconditionError as error:
            self._name(verdict, error.message)
            return False
        log.warning("server %s is drained: %s", verdict.server_id, verdict.message)
        self._window.forget([verdict.server_id])
        self._named = {named for named in self._named if named[0] != verdict.server_id}
        self._on_drained(verdict)
        return True

    def _name(self, verdict: Verdict, why_not: str) -> None:
        if (verdict.server_id, verdict.reason) not in self._named:
            self._named.add((verdict.server_id, verdict.reason))
            log.warning("server %s is not drained although it should be: %s", verdict.server_id, why_not)

    def _show(self, standings: Mapping[str, Standing]) -> None:
        gauge = self._metrics.server_mismatch_nats
        for server_id in self._shown - standings.keys():
            gauge.remove(server_id)
        for server_id, standing in standings.items():
            gauge.labels(server_id).set(standing.excess_nats)
        self._shown = set(standings)


def verdicts(
    standings: Mapping[str, Standing], servers: Sequence[ServerStatus], options: FleetOptions
) -> list[Verdict]:
    """The servers to drain now, the worst first."""
    at_work = {server.server_id: server for server in servers if server.drained is None}
    diverging = [
        (standing, server_id)
        for server_id, standing in standings.items()
        if server_id in at_work and standing.surely_nats > options.max_excess_nats
    ]
    diverging.sort(key=lambda entry: -entry[0].excess_nats)
    found = [
        Verdict(
            server_id,
            DrainReason.DIVERGING,
            f"its log-probs are {standing.excess_nats:.3g} nats per token further from the learner's than those of the "
            f"others at equal staleness, over {standing.num_tokens} tokens (learner.fleet.max_excess_nats is "
            f"{options.max_excess_nats:g})",
        )
        for standing, server_id in diverging
    ]
    named = {verdict.server_id for verdict in found}
    return found + [verdict for verdict in _slow(list(at_work.values()), options) if verdict.server_id not in named]


def _slow(servers: Sequence[ServerStatus], options: FleetOptions) -> list[Verdict]:
    timed = [server for server in servers if server.present and server.timed_tickets >= options.min_groups]
    found: list[Verdict] = []
    for server in timed:
        others = [other.median_ticket_seconds for other in timed if other is not server]
        if not others:
            continue
        usual = statistics.median_low(others)
        if server.median_ticket_seconds > max(options.slow_ratio * usual, options.slow_seconds):
            message = (
                f"its groups take {server.median_ticket_seconds:.3g} s, those of the others {usual:.3g} s "
                f"(medians; learner.fleet.slow_ratio is {options.slow_ratio:g})"
            )
            found.append(Verdict(server.server_id, DrainReason.SLOW, message))
    return found
