"""What a worker remembers of refusals."""

from __future__ import annotations

from inference_server.rollout.open_tickets import RefusedAttempts
from leeway.types import WriteResult, WriteStatus


def refusal(trajectory: int, *, attempt: int = 1, seq: int = 0) -> WriteResult:
    return WriteResult(f"g-{trajectory}", attempt, seq, WriteStatus.INVALID)


def test_an_attempt_is_new_once() -> None:
    refusals = RefusedAttempts(capacity=8)
    assert refusals.add(refusal(0))
    assert not refusals.add(refusal(0, seq=1))
    assert refusals.add(refusal(0, attempt=2))


def test_what_is_remembered_is_bounded_and_the_newest() -> None:
    refusals = RefusedAttempts(capacity=8)
    for number in range(10_000):
        assert refusals.add(refusal(number))
        assert not refusals.add(refusal(-1)) or number == 0, "heard of again and again, it is not the oldest"
    assert len(refusals) == 8
    assert not any(refusals.add(refusal(number)) for number in range(9_993, 10_000))
    assert refusals.add(refusal(9_992))
