"""The replay buffer as its callers see it: dataclasses in, dataclasses out, LeewayErrors for failures.

One `ReplayClient` per process. Unary calls wait for the connection and repeat while the buffer restarts, up to
`patience_seconds`. The learner's calls, all of which may be repeated, also wait while the buffer has no room (its disk
is full): it says when to come back. The rollout worker drives `write_stream`.
"""

from leeway.replay_client.fleet_calls import FleetCalls
from leeway.replay_client.learner_calls import LearnerCalls
from leeway.replay_client.people_calls import PeopleCalls
from leeway.replay_client.worker_calls import Work, WorkerCalls


class ReplayClient(WorkerCalls, LearnerCalls, FleetCalls, PeopleCalls):
    """A connection to one replay buffer for one run, with every call."""


__all__ = ["ReplayClient", "Work"]
