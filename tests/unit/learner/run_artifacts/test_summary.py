from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from learner.run_artifacts.journal import merge_intervals, overlap_seconds

INTERVALS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 8)).map(lambda pair: (pair[0], pair[0] + pair[1])))


def seconds(intervals: Iterable[tuple[float, float]]) -> set[int]:
    return {second for start, end in intervals for second in range(int(start), int(end))}


@given(INTERVALS, INTERVALS)
def test_overlap_counts_the_seconds_in_both(left: list[tuple[float, float]], right: list[tuple[float, float]]) -> None:
    assert overlap_seconds(left, right) == len(seconds(left) & seconds(right))
    assert seconds(merge_intervals(left)) == seconds(left)
