"""A backup of a running buffer, and what happens when it is put in the original's place."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from leeway.errors import FencedError, PreconditionError
from leeway.types import DropReason, GroupState, WriteItem, WriteStatus
from replay_buffer import run_store
from replay_buffer.storage import backup as backup_module
from replay_buffer.storage import directory as storage_module
from replay_buffer.storage.backup import write_backup
from replay_buffer.storage.segments import locations_of, segment_numbers, segment_path
from replay_buffer.storage.snapshots import read_generation
from tests.harness.replay_builders import ROOT, RUN, chunk, described, filled, version
from tests.harness.replay_directory import OpenBuffer, opened


@pytest.fixture(autouse=True)
def snapshot_at_each_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "_AMPLIFICATION", 0)


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return tmp_path / "original"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return tmp_path / "copy"


async def grown(run: OpenBuffer, steps: int = 6) -> None:
    await run.open_run()
    for _ in range(steps):
        await run.step()


@pytest.mark.parametrize("links", [True, False])
async def test_a_backup_holds_what_was_acknowledged(
    original: Path, copy: Path, monkeypatch: pytest.MonkeyPatch, *, links: bool
) -> None:
    if not links:

        def refuse(*_: object) -> None:
            raise OSError("another disk")

        monkeypatch.setattr(backup_module.os, "link", refuse)
    async with opened(original) as run:
        await grown(run)
        tickets, *_ = await run.buffer.acquire_tickets(RUN, "s0", run.state.head, 1000, 0)
        run.buffer.write(RUN, filled(tickets[0], [run.state.head]))
        backup = await run.buffer.back_up(copy)
        before = described(run.state)
        await run.step()  # the original goes on
        assert backup.size_bytes == sum(segment_path(copy, n).stat().st_size for n in segment_numbers(copy))
    first = segment_path(copy, 1)
    assert (first.stat().st_ino == segment_path(original, 1).stat().st_ino) is links
    newest = segment_numbers(copy)[-1]
    assert segment_path(copy, newest).stat().st_nlink == 1, "the open segment is written on, so it is a copy"
    async with opened(copy) as run:
        after = described(run.state)
        assert after["committed_step"] == before["committed_step"]
        assert after["consumed"] == before["consumed"]
        ready = run.state.groups[tickets[0].group_id]
        assert ready.state is GroupState.READY
        assert all(run.buffer.read_many([place]) for member in ready.members for place in locations_of(member))


async def test_a_restored_copy_fences_what_the_original_did_afterwards(original: Path, copy: Path) -> None:
    async with opened(original) as run:
        await grown(run, 3)
        tickets, *_ = await run.buffer.acquire_tickets(RUN, "s0", run.state.head, 1000, 0)
        head = run.state.head
        await run.buffer.back_up(copy)
        # The original goes on: another learner, other groups.
        late_epoch = (await run.buffer.open_run(run.state.spec, head, [])).epoch
        await run.step()
    async with opened(copy) as run:
        state = run.state
        assert state.head == head
        # Its learner's epoch, which the copy has never allocated, is below the fence.
        for epoch in (1, late_epoch, late_epoch + 100):
            with pytest.raises(FencedError):
                await run.buffer.commit(RUN, epoch, 1)
        # What was issued may have been issued again there: nobody may write it here.
        lost = [state.groups[ticket.group_id] for ticket in tickets]
        assert {(group.state, group.drop_reason) for group in lost} == {(GroupState.DROPPED, DropReason.ROLLED_BACK)}
        zombie = [
            WriteItem(ticket.members[0].trajectory_id, attempt, 0, chunk()) for ticket in tickets for attempt in (1, 2)
        ]
        assert {r.status for r in run.buffer.write(RUN, zombie)} <= {WriteStatus.ABORTED, WriteStatus.UNKNOWN}
        # Ids of groups that the original may have made since are never used here.
        reopened = await run.buffer.open_run(state.spec, head, [])
        assert reopened.epoch > late_epoch + 1000
        fresh, *_ = await run.buffer.acquire_tickets(RUN, "s0", head, 1000, 0)
        numbers = [int(ticket.group_id.removeprefix(f"{RUN}-g")) for ticket in fresh]
        assert min(numbers) > 1_000_000
        # Nothing is lost: the tasks come again, first.
        assert [ticket.task_index for ticket in fresh][: len(tickets)] == [ticket.task_index for ticket in tickets]
        await run.step()


async def test_restored_copies_are_above_the_original_and_apart_whatever_the_clock_says(
    original: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(original) as run:
        await grown(run, 3)
        created = run.state.created
        await run.buffer.back_up(copy)
    fences: list[tuple[int, int]] = []
    for number, now in enumerate((0.0, 2e9, 1e9, 1e9, -1e9)):  # 1970, 2033, back again, standing still, before 1970
        restored = original.parent / f"restored-{number}"
        shutil.copytree(copy, restored)
        with monkeypatch.context() as clock:
            clock.setattr(run_store.time, "time", lambda now=now: now)
            clock.setattr(run_store.time, "time_ns", lambda now=now: max(int(now * 1e9), 0))
            async with opened(restored) as run:
                fences.append((run.state.epoch, run.state.created))
                await run.open_run(run.state.head)
                assert run.state.epoch == fences[-1][0] + 1
                await run.step()
    epochs = [epoch for epoch, _ in fences]
    # No original starts a learner or issues a group 2^39 times after its backup.
    assert min(epochs) > 1 << 39
    assert min(number for _, number in fences) > created + (1 << 39)
    assert len(set(epochs)) == len(epochs)
    assert epochs[1] == max(epochs)  # the clock as a hint: what is restored later is above
    assert max(epochs) < 1 << 53  # exact wherever numbers are floating point


async def test_a_checkpoint_ahead_of_the_copy_is_refused_plainly(original: Path, copy: Path) -> None:
    async with opened(original) as run:
        await grown(run, 3)
        await run.buffer.back_up(copy)
        await run.step()
        ahead, ledger = run.state.head, [(4, run.state.batch(4))]
    async with opened(copy) as run:
        with pytest.raises(
            PreconditionError,
            match=r"ahead of this log, which was restored from a backup taken at .*restore a newer backup, or remove "
            r"checkpoints after step 3",
        ):
            await run.buffer.open_run(run.state.spec, ahead, ledger)
        assert (await run.buffer.open_run(run.state.spec, version(3), [])).head == version(3)


async def test_a_copy_is_a_generation_of_its_own_once_it_is_opened(original: Path, copy: Path) -> None:
    async with opened(original) as run:
        await grown(run)
        await run.buffer.back_up(copy)
    first, backup = read_generation(original), read_generation(copy)
    assert first is not None
    assert backup is not None
    assert (backup.id, backup.parents) == (b"", (first.id,))
    async with opened(copy) as run:
        epoch = run.state.epoch
    restored = read_generation(copy)
    assert restored is not None
    assert restored.id not in (b"", first.id)
    assert restored.parents == (first.id,)
    async with opened(copy) as run:  # only once
        assert run.state.epoch == epoch
        again = copy.with_name("again")
        await run.buffer.back_up(again)
    grandchild = read_generation(again)
    assert grandchild is not None
    assert grandchild.parents == (first.id, restored.id)


async def test_a_copy_that_dies_before_it_is_durable_is_restored_again(
    original: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(original) as run:
        await grown(run)
        await run.buffer.back_up(copy)

    def die(*_: object) -> None:
        raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(storage_module, "write_generation", die)
        async with opened(copy, cleanly=False) as run:
            first = run.state.epoch
            await run.log.durable()
    async with opened(copy) as run:
        assert run.state.epoch > first
        assert run.state.committed_step == 6


async def test_a_copy_of_a_log_whose_beginning_is_retired(original: Path, copy: Path) -> None:
    async with opened(original, retain_bytes=0) as run:
        await run.open_run()
        for step in range(1, 9):
            await run.step(oldest_kept_step=max(step - 2, 1))
        await run.buffer.back_up(copy)
        before = described(run.state)
    assert segment_numbers(copy)[0] > 1
    async with opened(copy, retain_bytes=0) as run:
        assert described(run.state)["consumed"] == before["consumed"]
        await run.buffer.open_run(run.state.spec, run.state.head, [])
        await run.step()


async def test_only_what_is_durable_is_copied(original: Path, copy: Path) -> None:
    async with opened(original) as run:
        await grown(run, 3)
        end, generation = run.log.durable_end, run.buffer._store.storage.generation
    path = segment_path(original, end.segment)
    path.write_bytes(path.read_bytes() + b"written, not synced")
    segment_path(original, end.segment + 1).write_bytes(b"neither")
    backup = write_backup(original, copy, end, generation)
    assert segment_numbers(copy)[-1] == end.segment
    assert segment_path(copy, end.segment).read_bytes() == path.read_bytes()[: end.offset]
    assert backup.end == end


async def test_nothing_is_overwritten(original: Path, copy: Path) -> None:
    async with opened(original) as run:
        await run.open_run()
        await run.buffer.back_up(copy)
        with pytest.raises(PreconditionError, match="exists"):
            await run.buffer.back_up(copy)
        with pytest.raises(PreconditionError, match="no backup was written"):
            await run.buffer.back_up(Path("/proc/nowhere/copy"))
        await run.buffer.open_run(run.state.spec, ROOT, [])
