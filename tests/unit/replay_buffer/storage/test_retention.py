"""What may be deleted, what may not, and what is said about it afterwards."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from leeway.config import ReplayBufferOptions
from leeway.errors import CorruptDataError, NotFoundError, PreconditionError
from leeway.types import Evaluation, GroupState, Purpose, SamplingParams, WriteItem, WriteStatus
from replay_buffer.storage import directory as storage_module
from replay_buffer.storage.index_file import FILE, Filter, oldest_segment
from replay_buffer.storage.retention import choose_beginning, first_needed
from replay_buffer.storage.segments import Segment, locations_of, remove_segments, segment_numbers, segment_path
from replay_buffer.storage.snapshots import snapshot_path, snapshot_positions
from tests.harness.replay_builders import RUN, chunk, close, described, filled, version
from tests.harness.replay_directory import SEGMENT_BYTES, OpenBuffer, opened


@pytest.fixture(autouse=True)
def snapshot_at_each_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "_AMPLIFICATION", 0)


async def train(run: OpenBuffer, steps: int, keep: int) -> None:
    """Steps, each with a checkpoint, of which the newest `keep` are kept."""
    for _ in range(steps):
        step = run.state.head.step + 1
        await run.step(oldest_kept_step=max(step - keep + 1, 1))


async def steps_listed(run: OpenBuffer) -> list[int]:
    views = [view async for view in run.buffer.export(RUN, Filter(state=GroupState.CONSUMED), 0)]
    return sorted({view.step for view in views})


async def test_without_limits_everything_stays(tmp_path: Path) -> None:
    async with opened(tmp_path) as run:
        await run.open_run()
        await train(run, 8, keep=1)
        assert segment_numbers(tmp_path)[0] == 1
        assert await steps_listed(run) == list(range(1, 9))


async def test_what_a_kept_checkpoint_needs_stays_and_the_rest_goes(tmp_path: Path) -> None:
    async with opened(tmp_path, cleanly=False, retain_bytes=0) as run:
        await run.open_run()
        await train(run, 12, keep=4)
        assert segment_numbers(tmp_path)[0] > 5
        kept = await steps_listed(run)
        # Steps after the oldest checkpoint (that of step 9) can be computed again.
        assert kept[-3:] == [10, 11, 12]
        assert kept[0] > 3
        for step in (10, 11, 12):
            views = [view async for view in run.buffer.export(RUN, Filter(Purpose.TRAIN, None, step), 0)]
            assert [view.step for view in views] == [step, step]
            for location in [place for view in views for member in view.members for place in locations_of(member)]:
                assert run.buffer.read_many([location])
        assert sum(segment_path(tmp_path, n).stat().st_size for n in segment_numbers(tmp_path)) == run.log.size_bytes


async def test_a_learner_that_keeps_everything_keeps_the_log(tmp_path: Path) -> None:
    async with opened(tmp_path, retain_bytes=0) as run:
        await run.open_run()
        for _ in range(8):
            await run.step(oldest_kept_step=0)
        assert segment_numbers(tmp_path)[0] <= 2  # before the first chunk lie only control records
        assert await steps_listed(run) == list(range(1, 9))


async def test_a_finished_run_lets_go_once_another_goes_on(tmp_path: Path) -> None:
    """Alone, it stays replayable: what it pins does not grow."""
    async with opened(tmp_path, retain_bytes=0) as run:
        ended = run.of("ended")
        await ended.open_run()
        await train(ended, 6, keep=4)
        await run.buffer.finish_run("ended", ended.state.epoch)
        await run.settled()
        kept = [view async for view in run.buffer.export("ended", Filter(step=6), 0)]
        assert len(kept) == 2
        pinned = min(locations_of(member)[0].segment for view in kept for member in view.members)
        assert segment_numbers(tmp_path)[0] <= pinned
        await run.open_run()
        await train(run, 12, keep=2)
        assert segment_numbers(tmp_path)[0] > pinned
        assert run.log.size_bytes < 8 * SEGMENT_BYTES
        with pytest.raises(NotFoundError, match="step 6 trained on have been retired"):
            [view async for view in run.buffer.export("ended", Filter(step=6), 0)]
        assert (await steps_listed(run))[-2:] == [11, 12]


async def test_a_run_that_was_left_pins_the_log_until_it_is_given_up(tmp_path: Path) -> None:
    async with opened(tmp_path, cleanly=False, retain_bytes=0) as run:
        left = run.of("left")
        await left.open_run()
        await train(left, 6, keep=4)
        await left.step(commit=False)  # trained, and its learner died before the checkpoint
        tickets, *_ = await run.buffer.acquire_tickets("left", "s0", left.state.head, 1000, 0)
        run.buffer.write("left", filled(tickets[0], [left.state.head]))
        await run.open_run()
        await train(run, 12, keep=2)
        segments = [oldest_segment(group) for group in left.state.groups.unended.values()]
        pinned = min(number for number in segments if number is not None)
        assert segment_numbers(tmp_path)[0] <= pinned
        assert run.log.size_bytes > 8 * SEGMENT_BYTES

        assert await run.buffer.give_up_run("left") == len(segments)
        await train(run, 4, keep=2)
        assert segment_numbers(tmp_path)[0] > pinned
        assert run.log.size_bytes < 8 * SEGMENT_BYTES
        before = described(left.state)
    async with opened(tmp_path, retain_bytes=0) as run:
        assert described(run.of("left").state) == before
        with pytest.raises(PreconditionError, match="ended permanently"):
            await run.of("left").open_run(version(6, run="left"))
        await train(run, 2, keep=2)


async def test_two_finished_runs_keep_what_can_be_replayed(tmp_path: Path) -> None:
    async with opened(tmp_path, retain_bytes=0) as run:
        for name in ("one", "two"):
            of = run.of(name)
            await of.open_run()
            await train(of, 4, keep=4)
            await run.buffer.finish_run(name, of.state.epoch)
        await run.settled()
        needed = first_needed([run.of(name).state for name in ("one", "two")], run.buffer._store.storage.index, 1 << 30)
        two = [view async for view in run.buffer.export("two", Filter(step=4), 0)]
        assert needed <= min(locations_of(member)[0].segment for view in two for member in view.members)


async def test_a_live_group_keeps_its_segment(tmp_path: Path) -> None:
    async with opened(tmp_path, retain_bytes=0) as run:
        await run.open_run()
        await train(run, 2, keep=1)
        state = run.state
        evaluation = Evaluation("slow", state.head, 1, 2, SamplingParams(max_tokens=16))
        await run.buffer.create_evaluation(state.epoch, evaluation)
        (slow,), *_ = await run.buffer.acquire_tickets(RUN, "s0", state.head, 2, 0)
        run.buffer.write(RUN, [WriteItem(slow.members[0].trajectory_id, 1, 0, chunk([state.head]))])
        held = oldest_segment(state.groups[slow.group_id])
        assert held is not None
        await train(run, 8, keep=1)
        assert segment_numbers(tmp_path)[0] <= held
        results = run.buffer.write(RUN, filled(slow, [evaluation.version]))
        assert {result.status for result in results} == {WriteStatus.ACKNOWLEDGED}
        await train(run, 3, keep=1)
        assert segment_numbers(tmp_path)[0] > held
        assert (await run.buffer.await_evaluation(RUN, "slow", 0)).rewards == (1.0, 1.0)


@pytest.mark.parametrize("loss", ["nothing", "index", "newer snapshots"])
async def test_a_restart_after_retention_finds_the_same(tmp_path: Path, loss: str) -> None:
    async with opened(tmp_path, cleanly=False, retain_bytes=0) as run:
        await run.open_run()
        await train(run, 12, keep=3)
        before = described(run.state)
    assert segment_numbers(tmp_path)[0] > 1
    if loss == "index":
        (tmp_path / FILE).unlink()
    if loss == "newer snapshots":
        for position in snapshot_positions(tmp_path)[1:]:
            snapshot_path(tmp_path, position).unlink()
    async with opened(tmp_path, retain_bytes=0) as run:
        assert described(run.state) == before
        await train(run, 2, keep=3)


async def test_an_interrupted_deletion_is_finished_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[list[int]] = []

    def die(directory: Path, numbers: list[int]) -> None:
        removed.append(numbers)
        for number in numbers[: len(numbers) // 2]:
            segment_path(directory, number).unlink()
        raise OSError("killed")

    async with opened(tmp_path, cleanly=False) as run:
        await run.open_run()
        await train(run, 12, keep=3)
    monkeypatch.setattr(storage_module, "remove_segments", die)
    async with opened(tmp_path, cleanly=False, retain_bytes=0) as run:
        while not removed:
            tickets, *_ = await run.buffer.acquire_tickets(RUN, "s0", run.state.head, 1000, 0)
            run.buffer.write(RUN, [item for ticket in tickets for item in filled(ticket, [run.state.head])])
            await run.step(oldest_kept_step=run.state.head.step - 2)
        before = described(run.state)
    left = segment_numbers(tmp_path)[0]
    assert 1 < left <= removed[0][-1]
    monkeypatch.undo()
    (tmp_path / FILE).unlink()
    async with opened(tmp_path, cleanly=False, retain_bytes=0) as run:
        assert described(run.state)["consumed"] == before["consumed"]
        await train(run, 4, keep=3)
        assert segment_numbers(tmp_path)[0] > removed[0][-1]


async def test_the_beginning_without_its_snapshot_is_refused(tmp_path: Path) -> None:
    async with opened(tmp_path, cleanly=False, retain_bytes=0) as run:
        await run.open_run()
        await train(run, 8, keep=1)
    for position in snapshot_positions(tmp_path):
        snapshot_path(tmp_path, position).unlink()
    with pytest.raises(CorruptDataError, match=r"the log begins here.*restore the directory from a backup"):
        async with opened(tmp_path):
            raise AssertionError("unreachable")


# What is said about it


async def test_a_retired_step_is_named_plainly(tmp_path: Path) -> None:
    async with opened(tmp_path, retain_bytes=0) as run:
        await run.open_run()
        await train(run, 10, keep=2)
        first = (await steps_listed(run))[0]
        with pytest.raises(NotFoundError, match=r"step 1 trained on have been retired.*step \d+ and later are still"):
            [view async for view in run.buffer.export(RUN, Filter(step=1), 0)]
        assert [view async for view in run.buffer.export(RUN, Filter(step=10), 0)]
        assert [view async for view in run.buffer.export(RUN, Filter(Purpose.TRAIN, None, 11), 0)] == []
        assert first > 1


async def test_writers_of_retired_groups_are_told_to_stop(tmp_path: Path) -> None:
    async with opened(tmp_path, retain_bytes=0) as run:
        await run.open_run()
        await train(run, 8, keep=1)
        data = chunk()
        items = [WriteItem(f"{RUN}-g1.0", 1, 0, data), WriteItem(f"{RUN}-g1.0", 1, 1, close([data]))]
        answers = run.buffer.write(RUN, items)
        assert {answer.status for answer in answers} == {WriteStatus.ABORTED}
        assert "retired" in answers[0].message
        assert await run.buffer.renew_leases(RUN, [(f"{RUN}-g1", 1)]) == [(f"{RUN}-g1", 1)]
        (unknown,) = run.buffer.write(RUN, [WriteItem(f"{RUN}-g{run.state.created + 1}.0", 1, 0, data)])
        assert unknown.status is WriteStatus.UNKNOWN


async def test_a_learner_may_resume_whose_ledger_names_retired_groups(tmp_path: Path) -> None:
    """Its commit was applied, the answer was lost."""
    async with opened(tmp_path, retain_bytes=0) as run:
        await run.open_run()
        ledger = [(step, await run.step(oldest_kept_step=step)) for step in range(1, 8)]
        assert run.state.batch(1) == ()
        opened_run = await run.buffer.open_run(run.state.spec, version(7), ledger)
        assert opened_run.epoch == 2


def test_a_deletion_that_is_cut_short_leaves_no_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(1, 6):
        segment_path(tmp_path, number).write_bytes(b"x")
    unlink, left = Path.unlink, [2]

    def until_killed(path: Path, *, missing_ok: bool = False) -> None:
        if not left[0]:
            raise OSError("killed")
        left[0] -= 1
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", until_killed)
    with pytest.raises(OSError, match="killed"):
        remove_segments(tmp_path, [4, 3, 2, 1])
    assert segment_numbers(tmp_path) == [3, 4, 5]


# Choosing


def segments(*ages: float, size_bytes: int = 10) -> list[Segment]:
    return [Segment(number + 1, size_bytes, 1000 - age) for number, age in enumerate(ages)]


ALL = [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("retain_bytes", "retain_seconds", "needed", "beginnings", "expected"),
    [
        (None, None, 5, ALL, None),
        (0, None, 5, ALL, 5),
        (0, None, 3, ALL, 3),
        (0, None, 1, ALL, None),
        (0, None, 5, [3], 3),
        (30, None, 5, ALL, 3),
        (49, None, 5, ALL, 2),
        (50, None, 5, ALL, None),
        (None, 25, 5, ALL, 4),
        (None, 25, 3, ALL, 3),
        (None, 100, 5, ALL, None),
        (50, 35, 5, ALL, 3),
        (25, 45, 5, ALL, 4),
    ],
)
def test_the_new_beginning(
    retain_bytes: int | None, retain_seconds: float | None, needed: int, beginnings: list[int], expected: int | None
) -> None:
    chosen = choose_beginning(
        segments(50, 40, 30, 20, 10), beginnings, needed, 1000, retain_bytes=retain_bytes, retain_seconds=retain_seconds
    )
    assert chosen == expected


def test_age_is_that_of_the_newest_record(tmp_path: Path) -> None:
    path = segment_path(tmp_path, 1)
    path.write_bytes(b"x" * 20)
    os.utime(path, (5, 7))
    assert storage_module.list_segments(tmp_path) == [Segment(1, 20, 7.0)]


def test_a_bound_below_two_segments_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"retain_bytes must be 0 or at least 2 \* segment_bytes"):
        ReplayBufferOptions(directory=Path("x"), segment_bytes=1 << 20, retain_bytes=1 << 20)
    for size in (None, 0, 2 << 20):
        ReplayBufferOptions(directory=Path("x"), segment_bytes=1 << 20, retain_bytes=size)
