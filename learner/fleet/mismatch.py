"""The distance between each server's behavior log-probs and the learner's log-probs of the same tokens.

For a token sampled by server s, with staleness a when it is trained on,

    d = min(|log pi(token) - log mu(token)|, 10)          pi: the learner's policy before the step

At staleness 0 pi has the very weights that the token's label names, so d is mismatch alone: numerics, wrong weights
under a right label, a wrong temperature, log-probs of another distribution. At a > 0 it contains how far the policy has
moved in a steps, which is the same for every server; so servers are compared at equal staleness only:

    m(s, a)     mean of d over the tokens of s at a
    r(s, a)     the lower median of m(o, a) over the others o with enough tokens at a; at a = 0, when there is none, 0
    excess(s) = sum_a n(s, a) (m(s, a) - r(s, a)) / sum_a n(s, a)       over every a that has an r, or over a = 0 alone

Tokens of a trajectory are not independent, so standard errors are those of a ratio of sums over trajectories (Cochran
1977, ch. 6). A server diverges when excess - 4 standard errors is above the bound, and it has enough tokens that can be
judged; of the two sums the surer one counts, since a policy that moves fast drowns mismatch at all but a = 0. A server
that is merely stale is compared with equally stale tokens, or not at all.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from learner.lineage import Branch, trajectory_staleness
from leeway.types import Float32Array, Trajectory

MAX_NATS: Final = 10.0
STANDARD_ERRORS: Final = 4.0


@dataclass(frozen=True, slots=True)
class Sample:
    """The tokens of one trajectory at one staleness."""

    server_id: str
    staleness: int
    num_tokens: int
    nats: float  # sum of d


@dataclass(frozen=True, slots=True)
class Standing:
    """One server, compared with the others."""

    excess_nats: float
    standard_error: float
    num_tokens: int  # that could be judged

    @property
    def surely_nats(self) -> float:
        """A lower bound of the excess."""
        return self.excess_nats - STANDARD_ERRORS * self.standard_error


def samples_of(
    trajectory: Trajectory, policy_logprobs: Float32Array, head_step: int, branches: Sequence[Branch]
) -> list[Sample]:
    """A trajectory's tokens in the loss, by staleness.

    Args:
        trajectory: as drawn.
        policy_logprobs: [tokens in the loss] of the policy before the step.
        head_step: step of that policy.
        branches: where each of the run's epochs started.
    """
    mask = trajectory.loss_mask
    if len(policy_logprobs) != int(mask.sum()):
        return []  # not all of it was scored
    nats = np.abs(policy_logprobs.astype(np.float64) - trajectory.behavior_logprobs[mask])
    nats = np.minimum(np.nan_to_num(nats, nan=MAX_NATS), MAX_NATS)
    staleness = trajectory_staleness(trajectory, head_step, branches)[mask]
    return [
        Sample(trajectory.server_id, int(age), int((staleness == age).sum()), float(nats[staleness == age].sum()))
        for age in np.unique(staleness)
    ]


class MismatchWindow:
    """The samples of the newest steps."""

    def __init__(self, window_steps: int) -> None:
        self._steps: deque[list[Sample]] = deque(maxlen=window_steps)

    def add(self, samples: Iterable[Sample]) -> None:
        """Append one step's samples."""
        self._steps.append(list(samples))

    def forget(self, server_ids: Iterable[str]) -> None:
        """Drop the samples of these servers."""
        gone = set(server_ids)
        for number, samples in enumerate(self._steps):
            self._steps[number] = [sample for sample in samples if sample.server_id not in gone]

    def standings(self, min_tokens: int) -> dict[str, Standing]:
        """Every server that has tokens which can be judged, at least `min_tokens` of them."""
        return standings([sample for samples in self._steps for sample in samples], min_tokens)


def standings(samples: Sequence[Sample], min_tokens: int) -> dict[str, Standing]:
    """Compare servers; see the module's docstring."""
    cells: dict[int, dict[str, _Cell]] = defaultdict(dict)
    grouped: dict[tuple[int, str], list[Sample]] = defaultdict(list)
    for sample in samples:
        grouped[sample.staleness, sample.server_id].append(sample)
    for (age, server_id), members in grouped.items():
        cells[age][server_id] = _cell(members)
    judged: dict[str, list[Standing]] = defaultdict(list)
    compared: dict[str, list[tuple[_Cell, _Cell]]] = defaultdict(list)
    for age, servers in cells.items():
        for server_id, cell in servers.items():
            reference = _reference(age, server_id, servers, min_tokens)
            if reference is not None:
                compared[server_id].append((cell, reference))
                if age == 0:
                    judged[server_id].append(_standing([(cell, reference)]))
    for server_id, pairs in compared.items():
        judged[server_id].append(_standing(pairs))
    enough = {
        server_id: [standing for standing in both if standing.num_tokens >= min_tokens]
        for server_id, both in judged.items()
    }
    return {server_id: max(both, key=lambda one: one.surely_nats) for server_id, both in enough.items() if both}


@dataclass(frozen=True, slots=True)
class _Cell:
    """One server at one staleness."""

    num_tokens: int
    mean_nats: float
    variance: float  # of the mean


_NOTHING: Final = _Cell(0, 0.0, 0.0)
"""The reference for tokens that the learner's own weights sampled: no mismatch."""


def _cell(samples: Sequence[Sample]) -> _Cell:
    tokens = np.array([sample.num_tokens for sample in samples], dtype=np.float64)
    nats = np.array([sample.nats for sample in samples])
    mean = float(nats.sum() / tokens.sum())
    count = len(samples)
    if count < 2:
        return _Cell(int(tokens.sum()), mean, math.inf)
    spread = float(((nats - mean * tokens) ** 2).sum()) * count / (count - 1)
    return _Cell(int(tokens.sum()), mean, spread / float(tokens.sum()) ** 2)


def _reference(age: int, server_id: str, servers: Mapping[str, _Cell], min_tokens: int) -> _Cell | None:
    others = [cell for name, cell in servers.items() if name != server_id and cell.num_tokens >= min_tokens]
    if not others:
        return _NOTHING if age == 0 else None
    others.sort(key=lambda cell: cell.mean_nats)
    return others[(len(others) - 1) // 2]


def _standing(pairs: Sequence[tuple[_Cell, _Cell]]) -> Standing:
    total = sum(cell.num_tokens for cell, _ in pairs)
    excess = sum(cell.num_tokens * (cell.mean_nats - reference.mean_nats) for cell, reference in pairs) / total
    variance = sum((cell.num_tokens / total) ** 2 * (cell.variance + reference.variance) for cell, reference in pairs)
    return Standing(excess, math.sqrt(variance), total)
