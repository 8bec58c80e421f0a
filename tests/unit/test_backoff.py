from __future__ import annotations

from leeway.rpc import Backoff


def test_pauses_double_up_to_the_longest_and_start_again_after_a_success() -> None:
    backoff = Backoff(first_seconds=0.1, most_seconds=0.5)
    assert [backoff.next_seconds() for _ in range(5)] == [0.1, 0.2, 0.4, 0.5, 0.5]
    backoff.reset()
    assert backoff.next_seconds() == 0.1


def test_the_pause_that_a_peer_asks_for_wins_and_counts_as_a_failure() -> None:
    backoff = Backoff(first_seconds=0.1, most_seconds=2.0)
    assert [backoff.next_seconds(told_seconds=7.0), backoff.next_seconds()] == [7.0, 0.2]


def test_any_number_of_failures_gives_the_longest_pause() -> None:
    assert Backoff(num_failures=10_000).next_seconds() == 2.0
