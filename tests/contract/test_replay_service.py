"""ReplayService over real gRPC, through the client that its callers use."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Generator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from leeway import codec
from leeway.errors import (
    DeadlineError,
    ExhaustedError,
    FencedError,
    InvalidDataError,
    NotFoundError,
    PreconditionError,
    UnavailableError,
)
from leeway.replay_client import ReplayClient
from leeway.rpc import mapped_errors
from leeway.types import (
    DropReason,
    Evaluation,
    GroupState,
    PolicyVersion,
    Purpose,
    Ticket,
    TrajectoryFailure,
    WriteItem,
    WriteStatus,
)
from leeway.v1 import replay_pb2
from replay_buffer.buffer import ReplayBuffer
from replay_buffer.rpc import service
from replay_buffer.storage.segments import AppendFile, segment_path
from tests.deadlines import WAIT_SECONDS
from tests.harness.buffer_server import connected, serving, serving_buffer, write
from tests.harness.disks import HeldDisk
from tests.harness.replay_builders import (
    DATASET,
    ROOT,
    RUN,
    SIGNATURE,
    chunk,
    close,
    filled,
    spec,
    version,
    whole,
)

ACKNOWLEDGED = WriteStatus.ACKNOWLEDGED


@pytest.fixture
async def address(tmp_path: Path) -> AsyncIterator[str]:
    async with serving(tmp_path) as address:
        yield address


@pytest.fixture
async def client(address: str) -> AsyncIterator[ReplayClient]:
    async with connected(address) as client:
        yield client


async def fill(client: ReplayClient, at: PolicyVersion, groups: int) -> list[Ticket]:
    """Complete this many new groups at one version."""
    tickets, finished, _ = await client.acquire_tickets("s0", at, groups * 2, WAIT_SECONDS)
    assert not finished
    assert len(tickets) == groups
    results = await write(client, [item for ticket in tickets for item in filled(ticket, [at])])
    assert {result.status for result in results} == {ACKNOWLEDGED}
    return tickets


@contextmanager
def leases_of(buffer: ReplayBuffer, seconds: float) -> Generator[None]:
    """A ticket that is issued within the block has such a lease; nothing else can lapse while the test looks on."""
    leases = buffer._store.runs[RUN].leases
    usual, leases.lease_seconds = leases.lease_seconds, seconds
    yield
    leases.lease_seconds = usual


async def test_a_run_from_open_to_finish(client: ReplayClient) -> None:
    opened = await client.open_run(spec(total_steps=2), ROOT, [])
    assert (opened.epoch, opened.head, opened.finished) == (1, ROOT, False)
    assert await client.join_run("s0", SIGNATURE, DATASET, WAIT_SECONDS) == (spec(total_steps=2), False)
    await fill(client, ROOT, 4)
    head = ROOT
    for step in (1, 2):
        groups = await client.draw_batch(1, step, WAIT_SECONDS)
        assert [len(group.trajectories) for group in groups] == [2, 2]
        await client.advance(1, version(step), head)
        head = version(step)
    await client.commit(1, 2)
    await client.finish_run(1)
    assert (await client.join_run("late", SIGNATURE, DATASET, WAIT_SECONDS))[1]
    tickets, finished, _ = await client.acquire_tickets("s0", head, 8, WAIT_SECONDS)
    assert (tickets, finished) == ([], True)
    status = await client.run_status()
    assert (status.issued, status.consumed, status.open, status.ready, status.drawn) == (4, 4, 0, 0, 0)
    exported = [record async for record in client.export_groups()]
    assert [record.state for record in exported] == [GroupState.CONSUMED] * 4


async def test_a_group_without_signal_never_reaches_the_learner(client: ReplayClient) -> None:
    run_spec = spec(groups_per_step=1, max_staleness=0, drop_no_signal=True)
    await client.open_run(run_spec, ROOT, [])
    assert await client.join_run("s0", SIGNATURE, DATASET, WAIT_SECONDS) == (run_spec, False)
    dull = (await fill(client, ROOT, 1))[0]  # all rewards are 1
    drawing = asyncio.create_task(client.draw_batch(1, 1, WAIT_SECONDS))
    (ticket,), *_ = await client.acquire_tickets("s0", ROOT, 2, WAIT_SECONDS)  # its place is free at once
    for member in ticket.members:
        await write(client, whole(member, ticket.attempt, reward=float(member.member)))
    assert [group.group_id for group in await drawing] == [ticket.group_id]
    (record,) = [record async for record in client.export_groups(state=GroupState.DROPPED)]
    assert (record.group_id, record.drop_reason) == (dull.group_id, DropReason.NO_SIGNAL)


async def test_chunks_come_back_byte_for_byte(client: ReplayClient) -> None:
    await client.open_run(spec(members=1, groups_per_step=1), ROOT, [])
    ticket = (await client.acquire_tickets("s0", ROOT, 1, WAIT_SECONDS))[0][0]
    # An unknown field, which a parser would be free to lose or move.
    data = b"\xba\x3e\x05hello" + chunk()
    await write(client, whole(ticket.members[0], 1, data))
    drawn = client.stub.DrawBatch(replay_pb2.DrawBatchRequest(run=RUN, epoch=1, step=1), timeout=WAIT_SECONDS)
    pieces = [piece async for reply in drawn for piece in reply.pieces]
    assert [piece.chunk for piece in pieces if piece.WhichOneof("piece") == "chunk"] == [data]
    (record,) = [record async for record in client.export_groups()]
    assert record.trajectories[0].chunks == (data,)
    assert record.trajectories[0].close == close([data])


async def test_large_trajectories_travel_in_pieces(client: ReplayClient) -> None:
    run_spec = spec(members=2, groups_per_step=1)
    run_spec = replace(run_spec, signature=replace(SIGNATURE, context_length=1 << 20))
    await client.open_run(run_spec, ROOT, [])
    ticket = (await client.acquire_tickets("s0", ROOT, 2, WAIT_SECONDS))[0][0]
    data = chunk(sampled=300_000)
    for member in ticket.members:
        last = close([data], token_count=300_003)
        items = [WriteItem(member.trajectory_id, 1, 0, data), WriteItem(member.trajectory_id, 1, 1, last)]
        assert [result.status for result in await write(client, items)] == [ACKNOWLEDGED] * 2
    drawn = client.stub.DrawBatch(replay_pb2.DrawBatchRequest(run=RUN, epoch=1, step=1), timeout=WAIT_SECONDS)
    replies = [reply async for reply in drawn]
    # Headers, a chunk, the next header, its chunk.
    assert len(replies) == 4
    assert max(reply.ByteSize() for reply in replies) < len(data) + 1024


# Waiting


async def test_join_waits_for_the_learner(client: ReplayClient) -> None:
    with pytest.raises(DeadlineError, match="no learner has opened it"):
        await client.join_run("s0", SIGNATURE, DATASET, 0.01)
    joining = asyncio.create_task(client.join_run("s0", SIGNATURE, DATASET, WAIT_SECONDS))
    await client.open_run(spec(), ROOT, [])
    assert await joining == (spec(), False)


async def test_tickets_are_waited_for(client: ReplayClient) -> None:
    await client.open_run(spec(max_staleness=0), ROOT, [])
    await fill(client, ROOT, 2)
    assert await client.acquire_tickets("s0", ROOT, 8, 0.01) == ([], False, None)
    await client.draw_batch(1, 1, WAIT_SECONDS)
    await client.advance(1, version(1), ROOT)
    waiting = asyncio.create_task(client.acquire_tickets("s0", version(1), 4, WAIT_SECONDS))
    tickets, *_ = await waiting
    assert len(tickets) == 2
    # Everything the bound allows is out; the next request waits for the step.
    waiting = asyncio.create_task(client.acquire_tickets("s1", version(1), 4, WAIT_SECONDS))
    failure = TrajectoryFailure("over-long prompt", retryable=False)
    await write(client, [WriteItem(tickets[0].members[0].trajectory_id, 1, 0, failure)])
    assert len((await waiting)[0]) == 1


async def test_a_server_that_asks_at_a_newer_version_gets_its_older_call_back(client: ReplayClient) -> None:
    await client.open_run(spec(max_staleness=0), ROOT, [])
    await fill(client, ROOT, 2)
    never_served = asyncio.create_task(client.acquire_tickets("s0", ROOT, 4, 600))
    another = asyncio.create_task(client.acquire_tickets("s1", ROOT, 4, 600))
    await client.draw_batch(1, 1, WAIT_SECONDS)
    await client.advance(1, version(1), ROOT)
    assert len((await client.acquire_tickets("s0", version(1), 4, WAIT_SECONDS))[0]) == 2
    async with asyncio.timeout(WAIT_SECONDS):
        assert await never_served == ([], False, None)
    assert not another.done()
    another.cancel()


async def test_a_waiting_worker_hears_that_the_run_has_finished(client: ReplayClient) -> None:
    await client.open_run(spec(), ROOT, [])
    await client.acquire_tickets("s0", ROOT, 100, WAIT_SECONDS)
    waiting = asyncio.create_task(client.acquire_tickets("s1", ROOT, 8, WAIT_SECONDS))
    await client.finish_run(1)
    assert await waiting == ([], True, None)


async def test_a_draw_waits_for_whole_groups_and_names_what_is_missing(
    client: ReplayClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    await client.open_run(spec(), ROOT, [])
    await fill(client, ROOT, 1)
    await client.acquire_tickets("s7", ROOT, 2, WAIT_SECONDS)
    monkeypatch.setattr(service, "_DEADLINE_MARGIN_SECONDS", WAIT_SECONDS - 0.5)  # its answer comes before ours
    with pytest.raises(DeadlineError, match="needs 2 groups; 1 are ready and 1 are open at s7"):
        await client.draw_batch(1, 1, WAIT_SECONDS)
    monkeypatch.undo()
    drawing = asyncio.create_task(client.draw_batch(1, 1, WAIT_SECONDS))
    await fill(client, ROOT, 1)
    assert len(await drawing) == 2


async def test_an_evaluation_is_waited_for(client: ReplayClient) -> None:
    await client.open_run(spec(), ROOT, [])
    wanted = Evaluation("start", ROOT, task_count=2, members=1, sampling=spec().sampling)
    await client.acquire_tickets("s0", ROOT, 100, WAIT_SECONDS)
    working = asyncio.create_task(client.acquire_tickets("s0", ROOT, 2, WAIT_SECONDS))
    await client.create_evaluation(1, wanted)
    await client.create_evaluation(1, wanted)
    assert not (await client.await_evaluation("start", 0)).complete
    tickets, *_ = await working
    assert {ticket.purpose for ticket in tickets} == {Purpose.EVAL}
    waiting = asyncio.create_task(client.await_evaluation("start", WAIT_SECONDS))
    for ticket, reward in zip(tickets, (0.0, 1.0), strict=True):
        await write(client, whole(ticket.members[0], 1, reward=reward))
    result = await waiting
    assert (result.complete, result.rewards, result.failed) == (True, (0.0, 1.0), 0)
    with pytest.raises(NotFoundError):
        await client.await_evaluation("unheard of", 0)


# Fences


async def test_an_older_learner_is_refused_even_while_it_waits(client: ReplayClient) -> None:
    await client.open_run(spec(), ROOT, [])
    drawing = asyncio.create_task(client.draw_batch(1, 1, WAIT_SECONDS))
    await client.run_status()  # the draw is waiting by now
    assert (await client.open_run(spec(), ROOT, [])).epoch == 2
    with pytest.raises(FencedError, match="epoch 1 is fenced by epoch 2"):
        await drawing
    for call in (
        client.draw_batch(1, 1, WAIT_SECONDS),
        client.advance(1, version(1), ROOT),
        client.commit(1, 0),
        client.reject_group(1, "x", "y"),
        client.finish_run(1),
    ):
        with pytest.raises(FencedError):
            await call


async def test_a_lapsed_lease_issues_the_group_again_and_fences_the_first_server(tmp_path: Path) -> None:
    async with serving_buffer(tmp_path) as (address, buffer), connected(address) as client:
        await client.open_run(spec(max_staleness=0, groups_per_step=1), ROOT, [])
        with leases_of(buffer, 0.05):
            first = (await client.acquire_tickets("s0", ROOT, 2, WAIT_SECONDS))[0][0]
        again = (await client.acquire_tickets("s1", ROOT, 2, WAIT_SECONDS))[0][0]
        assert (again.group_id, again.attempt) == (first.group_id, 2)
        assert {result.status for result in await write(client, filled(first))} == {WriteStatus.ABORTED}
        assert await client.renew_leases("s0", [(first.group_id, 1), (again.group_id, 2), ("nonsense", 1)]) == [
            (first.group_id, 1),
            ("nonsense", 1),
        ]


async def test_a_server_that_joins_again_lost_its_tickets(client: ReplayClient) -> None:
    await client.open_run(spec(max_staleness=0, groups_per_step=2), ROOT, [])
    mine = (await client.acquire_tickets("s0", ROOT, 2, WAIT_SECONDS))[0][0]
    await client.acquire_tickets("s1", ROOT, 2, WAIT_SECONDS)
    await client.join_run("s0", SIGNATURE, DATASET, WAIT_SECONDS)
    tickets, *_ = await client.acquire_tickets("s2", ROOT, 8, WAIT_SECONDS)
    assert [(ticket.group_id, ticket.attempt) for ticket in tickets] == [(mine.group_id, 2)]


# Drawing


async def test_a_draw_is_idempotent_and_ranks_partition_it(client: ReplayClient) -> None:
    await client.open_run(spec(groups_per_step=5, members=1), ROOT, [])
    tickets, *_ = await client.acquire_tickets("s0", ROOT, 8, WAIT_SECONDS)
    await write(client, [item for ticket in tickets for item in filled(ticket)])
    whole_batch = [group.group_id for group in await client.draw_batch(1, 1, WAIT_SECONDS)]
    assert [group.group_id for group in await client.draw_batch(1, 1, WAIT_SECONDS)] == whole_batch

    async def ids(rank: int) -> list[str]:
        request = replay_pb2.DrawBatchRequest(run=RUN, epoch=1, step=1, rank=rank, world_size=2)
        stream = client.stub.DrawBatch(request, timeout=WAIT_SECONDS)
        return [
            piece.group.group_id
            async for reply in stream
            for piece in reply.pieces
            if piece.WhichOneof("piece") == "group"
        ]

    assert await ids(0) == whole_batch[0::2]
    assert await ids(1) == whole_batch[1::2]
    with pytest.raises(InvalidDataError, match="rank 2 does not exist among 2"), mapped_errors("DrawBatch"):
        await ids(2)


async def test_a_dead_server_holds_a_draw_up_no_longer_than_its_lease(tmp_path: Path) -> None:
    async with serving_buffer(tmp_path) as (address, buffer), connected(address) as client:
        await client.open_run(spec(max_staleness=1, groups_per_step=1, members=1), ROOT, [])
        with leases_of(buffer, 0.3):
            await client.acquire_tickets("dead", ROOT, 1, WAIT_SECONDS)
        (first,), *_ = await client.acquire_tickets("s0", ROOT, 1, WAIT_SECONDS)
        await write(client, filled(first))
        await client.draw_batch(1, 1, WAIT_SECONDS)
        await client.advance(1, version(1), ROOT)
        (young,), *_ = await client.acquire_tickets("s0", version(1), 1, WAIT_SECONDS)
        await write(client, filled(young, [version(1)]))
        # The dead server's group is at its deadline, so the younger one waits for it at first.
        (drawn,) = await client.draw_batch(1, 2, WAIT_SECONDS)
        assert drawn.group_id == young.group_id


async def test_a_rejected_group_is_replaced(client: ReplayClient) -> None:
    await client.open_run(spec(), ROOT, [])
    await fill(client, ROOT, 3)
    before = [group.group_id for group in await client.draw_batch(1, 1, WAIT_SECONDS)]
    await client.reject_group(1, before[0], "trajectory x has a non-finite loss")
    after = [group.group_id for group in await client.draw_batch(1, 1, WAIT_SECONDS)]
    assert after[0] not in before
    assert after[1] == before[1]
    dropped = [record async for record in client.export_groups(state=GroupState.DROPPED)]
    assert [(record.group_id, record.drop_reason) for record in dropped] == [(before[0], DropReason.INVALID)]
    assert "non-finite loss" in dropped[0].drop_message


# Restarts


async def test_a_restart_of_the_buffer_changes_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as address, connected(address) as client:
        await client.open_run(spec(), ROOT, [])
        await fill(client, ROOT, 3)
        open_ticket = (await client.acquire_tickets("s0", ROOT, 2, WAIT_SECONDS))[0][0]
        first_chunk = filled(open_ticket)[0]
        await write(client, [first_chunk])
        drawn = [group.group_id for group in await client.draw_batch(1, 1, WAIT_SECONDS)]
        await client.advance(1, version(1), ROOT)
        before = await client.run_status()
        exported = [record async for record in client.export_groups()]
    async with serving(tmp_path) as address, connected(address) as client:
        assert await client.run_status() == before
        assert [record async for record in client.export_groups()] == exported
        # The open ticket's lease began afresh, and the writer repeats what it does not know to be on disk.
        others, *_ = await client.acquire_tickets("s1", version(1), 100, WAIT_SECONDS)
        assert open_ticket.group_id not in {ticket.group_id for ticket in others}
        results = await write(client, filled(open_ticket))
        assert {result.status for result in results} == {ACKNOWLEDGED}
        assert len(await client.draw_batch(1, 2, WAIT_SECONDS)) == 2
        await client.commit(1, 1)
        step_1 = [record.group_id async for record in client.export_groups(state=GroupState.CONSUMED, step=1)]
        assert sorted(step_1) == sorted(drawn)


async def test_a_learner_restarts_from_its_checkpoint(tmp_path: Path) -> None:
    async with serving(tmp_path) as address, connected(address) as client:
        await client.open_run(spec(), ROOT, [])
        await fill(client, ROOT, 4)
        first = tuple(group.group_id for group in await client.draw_batch(1, 1, WAIT_SECONDS))
        await client.advance(1, version(1), ROOT)
        second = tuple(group.group_id for group in await client.draw_batch(1, 2, WAIT_SECONDS))
        await client.advance(1, version(2), version(1))
    async with serving(tmp_path) as address, connected(address) as client:
        with pytest.raises(PreconditionError, match="not what was drawn"):
            await client.open_run(spec(), version(1), [(1, second)])
        opened = await client.open_run(spec(), version(1), [(1, first)])
        assert (opened.epoch, opened.head) == (2, version(1))
        assert tuple(group.group_id for group in await client.draw_batch(2, 2, WAIT_SECONDS)) == second
        await client.advance(2, version(2, 2), version(1))
        await client.commit(2, 2)
        assert (await client.run_status()).consumed == 4


async def test_a_rollback_survives_a_restart_and_fences_a_learner_that_waits(tmp_path: Path) -> None:
    async with serving(tmp_path) as address, connected(address) as client:
        opened = await client.open_run(spec(max_staleness=0, groups_per_step=1), ROOT, [])
        heads = [ROOT]
        for step in (1, 2, 3):
            await fill(client, heads[-1], 1)
            await client.draw_batch(opened.epoch, step, WAIT_SECONDS)
            heads.append(version(step, opened.epoch))
            await client.advance(opened.epoch, heads[-1], heads[-2])
        await client.commit(opened.epoch, 2)
        waiting = asyncio.create_task(client.draw_batch(opened.epoch, 4, WAIT_SECONDS))
        await client.run_status()  # the draw has begun to wait before this is answered
        epoch, dropped = await client.rollback_run(heads[1])
        assert (epoch, dropped) == (2, 2)
        with pytest.raises(FencedError, match="was rolled back"):
            await waiting
        assert await client.rollback_run(heads[1]) == (2, 0)
    async with serving(tmp_path) as address, connected(address) as client:
        status = await client.run_status()
        assert (status.head, status.committed_step, status.consumed) == (heads[1], 1, 1)
        assert status.rollback is not None
        assert (status.rollback.version, status.rollback.epoch) == (heads[1], 2)
        assert status.dropped == {DropReason.ROLLED_BACK: 2}
        assert [group.step async for group in client.export_groups(state=GroupState.DROPPED)] == [0, 0]
        with pytest.raises(PreconditionError, match="resume from that checkpoint"):
            await client.open_run(spec(max_staleness=0, groups_per_step=1), heads[2], [])
        reopened = await client.open_run(spec(max_staleness=0, groups_per_step=1), heads[1], [])
        assert (reopened.epoch, reopened.head) == (3, heads[1])
        await fill(client, heads[1], 1)
        assert len(await client.draw_batch(3, 2, WAIT_SECONDS)) == 1


async def test_dead_letters_are_listed_and_queued_again(tmp_path: Path) -> None:
    async with serving(tmp_path) as address, connected(address) as client:
        await client.open_run(spec(max_staleness=0, groups_per_step=1, max_attempts=2), ROOT, [])
        for attempt in (1, 2):
            ((ticket,), *_) = await client.acquire_tickets(f"s{attempt}", ROOT, 2, WAIT_SECONDS)
            failure = TrajectoryFailure("the prompt kills the engine", retryable=True)
            await write(client, [WriteItem(member.trajectory_id, attempt, 0, failure) for member in ticket.members])
        (letter,) = await client.dead_letters()
        assert (letter.group_id, letter.task_index) == (ticket.group_id, ticket.task_index)
        assert (letter.reason, letter.attempts, letter.server_id) == (DropReason.DEAD_LETTER, 2, "s2")
        assert (await client.run_status()).dead_letters == 1
    async with serving(tmp_path) as address, connected(address) as client:
        assert await client.dead_letters() == [letter]
        with pytest.raises(NotFoundError):
            await client.requeue_dead_letters(["nobody"])
        waiting = asyncio.create_task(client.acquire_tickets("s3", ROOT, 2, 0))
        ((other,), *_) = await waiting
        assert other.task_index != letter.task_index
        await write(client, filled(other))
        assert await client.requeue_dead_letters([letter.group_id]) == 1
        assert await client.requeue_dead_letters() == 0
        assert await client.dead_letters() == []
        await client.draw_batch(1, 1, WAIT_SECONDS)
        await client.advance(1, version(1), ROOT)
        ((again,), *_) = await client.acquire_tickets("s3", version(1), 2, WAIT_SECONDS)
        assert (again.task_index, again.attempt) == (letter.task_index, 1)
        assert again.group_id != letter.group_id


async def test_runs_do_not_see_each_other(address: str) -> None:
    async with connected(address) as one, connected(address, "other-run") as other:
        await one.open_run(spec(), ROOT, [])
        with pytest.raises(NotFoundError, match="'other-run' is unknown here"):
            await other.run_status()
        other_spec = spec("other-run")
        await other.open_run(other_spec, other_spec.root, [])
        ticket = (await one.acquire_tickets("s0", ROOT, 2, WAIT_SECONDS))[0][0]
        theirs = (await other.acquire_tickets("s0", other_spec.root, 2, WAIT_SECONDS))[0][0]
        assert ticket.members[0].trajectory_id != theirs.members[0].trajectory_id
        assert {result.status for result in await write(other, filled(ticket))} == {WriteStatus.UNKNOWN}
        with pytest.raises(PreconditionError):
            await one.acquire_tickets("s0", other_spec.root, 2, WAIT_SECONDS)


# What is durable


async def test_nothing_is_answered_before_it_is_durable(tmp_path: Path) -> None:
    disk = HeldDisk()
    async with serving(tmp_path, open_file=disk.open) as address, connected(address) as client:
        await client.open_run(spec(), ROOT, [])
        await fill(client, ROOT, 2)
        ticket = (await client.acquire_tickets("s0", ROOT, 2, WAIT_SECONDS))[0][0]
        await client.draw_batch(1, 1, WAIT_SECONDS)
        disk.may_sync.clear()
        disk.synced.clear()
        waiting: list[asyncio.Task[object]] = [
            asyncio.create_task(call)
            for call in (
                write(client, filled(ticket)),
                client.advance(1, version(1), ROOT),
                client.acquire_tickets("s1", ROOT, 2, WAIT_SECONDS),
            )
        ]
        assert await asyncio.to_thread(disk.synced.wait, WAIT_SECONDS)
        # A reader sees what is not durable yet, so its answer waits as well.
        waiting.append(asyncio.create_task(client.run_status()))
        done, _ = await asyncio.wait(waiting, timeout=0.3)
        assert not done
        disk.may_sync.set()
        await asyncio.gather(*waiting)


async def test_what_was_acknowledged_survives_the_loss_of_everything_unsynced(tmp_path: Path) -> None:
    disk = HeldDisk()
    async with serving(tmp_path, open_file=disk.open) as address, connected(address) as client:
        await client.open_run(spec(), ROOT, [])
        acknowledged = await fill(client, ROOT, 3)
        before = await client.run_status()
        unanswered = (await client.acquire_tickets("s0", ROOT, 2, WAIT_SECONDS))[0][0]
        disk.may_sync.clear()
        disk.synced.clear()
        writing = asyncio.create_task(write(client, filled(unanswered)))
        assert await asyncio.to_thread(disk.synced.wait, WAIT_SECONDS)
        lost = tmp_path.with_name("after-power-loss")
        lost.mkdir()
        for path, size in disk.durable_bytes.items():
            (lost / path.name).write_bytes(path.read_bytes()[:size])
        assert not writing.done()
        disk.may_sync.set()
        await writing
    async with serving(lost) as address, connected(address) as client:
        after = await client.run_status()
        assert (after.ready, after.open) == (before.ready, 1)
        records = {record.group_id: record async for record in client.export_groups(state=GroupState.READY)}
        for ticket in acknowledged:
            chunks = [trajectory.chunks for trajectory in records[ticket.group_id].trajectories]
            assert chunks == [(chunk(),)] * 2


# Full disks


async def test_a_nearly_full_disk_stops_tickets_then_chunks(tmp_path: Path) -> None:
    free = [1 << 40]
    async with serving(tmp_path, free_bytes=lambda _: free[0]) as address, connected(address) as client:
        await client.open_run(spec(), ROOT, [])
        await fill(client, ROOT, 2)
        ticket = (await client.acquire_tickets("s0", ROOT, 2, WAIT_SECONDS))[0][0]
        items = filled(ticket)
        free[0] = 300 << 20
        with pytest.raises(ExhaustedError, match=r"300 MiB free, below replay_buffer\.soft_free_bytes"):
            await client.acquire_tickets("s0", ROOT, 2, WAIT_SECONDS)
        assert (await write(client, items[:1]))[0].status is ACKNOWLEDGED
        free[0] = 1 << 20
        statuses = [result.status for result in await write(client, [items[1], items[2]])]
        assert statuses == [ACKNOWLEDGED, WriteStatus.EXHAUSTED]
        # Control records have the rest of the disk.
        await client.draw_batch(1, 1, WAIT_SECONDS)
        await client.advance(1, version(1), ROOT)
        await client.commit(1, 1)
        free[0] = 1 << 40
        assert {result.status for result in await write(client, items)} == {ACKNOWLEDGED}


# Bad input


async def test_a_malformed_close_sets_its_trajectory_aside(client: ReplayClient) -> None:
    await client.open_run(spec(), ROOT, [])
    ticket = (await client.acquire_tickets("s0", ROOT, 2, WAIT_SECONDS))[0][0]
    data = chunk()
    items = whole(ticket.members[0], 1, data, reward=float("nan"))
    assert [result.status for result in await write(client, items)] == [ACKNOWLEDGED] * 2
    (record,) = [record async for record in client.export_groups(state=GroupState.DROPPED)]
    assert record.drop_reason is DropReason.FAILED
    assert ticket.members[0].trajectory_id in record.drop_message
    assert "the reward must be finite, but is nan" in record.drop_message
    assert record.trajectories[0].chunks == (data,)
    assert "finite" in record.trajectories[0].failure


async def test_bad_trajectories_are_set_aside_with_their_data(client: ReplayClient) -> None:
    await client.open_run(spec(), ROOT, [])
    cases = {
        "outside the vocabulary": chunk(token_id=64),
        "finite": chunk(logprob=float("nan")),
        "never registered": chunk([version(9)]),
    }
    tickets, *_ = await client.acquire_tickets("s0", ROOT, 2 * len(cases), WAIT_SECONDS)
    for ticket, data in zip(tickets, cases.values(), strict=True):
        assert (await write(client, whole(ticket.members[0], 1, data)))[0].status is ACKNOWLEDGED
    records = [record async for record in client.export_groups(state=GroupState.DROPPED)]
    for record, ticket, (cause, data) in zip(records, tickets, cases.items(), strict=True):
        assert cause in record.drop_message
        assert ticket.members[0].trajectory_id in record.drop_message
        assert record.trajectories[0].chunks == (data,)
    assert (await client.run_status()).dropped == {DropReason.INVALID: 2, DropReason.UNKNOWN_VERSION: 1}


async def test_items_without_content_are_refused_one_by_one(client: ReplayClient) -> None:
    await client.open_run(spec(), ROOT, [])
    ticket = (await client.acquire_tickets("s0", ROOT, 2, WAIT_SECONDS))[0][0]

    async def requests() -> AsyncIterator[replay_pb2.WriteTrajectoriesRequest]:
        items = [codec.item_to_proto(item) for item in filled(ticket)]
        items.insert(1, replay_pb2.WriteItem(trajectory_id="empty"))
        yield replay_pb2.WriteTrajectoriesRequest(run=RUN, items=items)

    async with asyncio.timeout(WAIT_SECONDS):
        results = [result async for reply in client.stub.WriteTrajectories(requests()) for result in reply.results]
    invalid = WriteStatus.INVALID
    assert [result.status for result in results] == [ACKNOWLEDGED, invalid, ACKNOWLEDGED, ACKNOWLEDGED, ACKNOWLEDGED]
    assert "neither chunk, close nor failure" in results[1].message


async def test_malformed_calls_say_what_is_wrong(client: ReplayClient) -> None:
    with pytest.raises(InvalidDataError, match="groups_per_step must be between 1 and"):
        await client.open_run(replace(spec(), groups_per_step=0), ROOT, [])
    with pytest.raises(NotFoundError, match="no learner has opened it"):
        await client.acquire_tickets("s0", ROOT, 2, WAIT_SECONDS)
    with pytest.raises(NotFoundError):
        await write(client, [WriteItem("x", 1, 0, b"")])
    await client.open_run(spec(), ROOT, [])
    with pytest.raises(InvalidDataError, match="request at least 1"):
        await client.acquire_tickets("s0", ROOT, 0, WAIT_SECONDS)
    with pytest.raises(PreconditionError, match="its tokenizer"):
        await client.join_run("s0", replace(SIGNATURE, tokenizer_digest=b"x" * 32), DATASET, WAIT_SECONDS)


async def test_export_filters_and_limits(client: ReplayClient) -> None:
    await client.open_run(spec(), ROOT, [])
    tickets = await fill(client, ROOT, 3)
    await client.acquire_tickets("s0", ROOT, 2, WAIT_SECONDS)
    newest = [record.group_id async for record in client.export_groups(state=GroupState.READY, limit=2)]
    assert newest == [ticket.group_id for ticket in tickets[1:]]
    open_groups = [record async for record in client.export_groups(state=GroupState.OPEN)]
    assert [len(record.trajectories) for record in open_groups] == [2]
    assert open_groups[0].trajectories[0].close is None
    assert [record async for record in client.export_groups(purpose=Purpose.EVAL)] == []


# Streams and stopping


async def test_a_stream_is_answered_in_order_while_it_goes_on(client: ReplayClient) -> None:
    await client.open_run(spec(members=1, groups_per_step=40), ROOT, [])
    tickets, *_ = await client.acquire_tickets("s0", ROOT, 100, WAIT_SECONDS)
    items = [item for ticket in tickets for item in filled(ticket)]

    async def requests() -> AsyncIterator[replay_pb2.WriteTrajectoriesRequest]:
        for item in items:
            yield replay_pb2.WriteTrajectoriesRequest(run=RUN, items=[codec.item_to_proto(item)])

    async with asyncio.timeout(WAIT_SECONDS):
        results = [result async for reply in client.stub.WriteTrajectories(requests()) for result in reply.results]
    assert [(result.trajectory_id, result.seq) for result in results] == [
        (item.trajectory_id, item.seq) for item in items
    ]


async def test_a_stop_releases_everyone_who_waits(tmp_path: Path) -> None:
    never = asyncio.Event()

    async def silent() -> AsyncIterator[replay_pb2.WriteTrajectoriesRequest]:
        yield replay_pb2.WriteTrajectoriesRequest(run=RUN)
        await never.wait()

    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(AsyncExitStack())
        address = await server.enter_async_context(serving(tmp_path))
        client = await stack.enter_async_context(connected(address))
        await client.open_run(spec(), ROOT, [])
        await client.acquire_tickets("s0", ROOT, 100, WAIT_SECONDS)
        stream = client.stub.WriteTrajectories(silent())
        assert await stream.read() is not None
        acquiring = client.stub.AcquireTickets(
            replay_pb2.AcquireTicketsRequest(
                run=RUN,
                server_id="s1",
                version=codec.version_to_proto(ROOT),
                max_members=2,
                wait=codec.duration_to_proto(600),
            ),
            timeout=600,
        )
        await client.run_status()
        await server.aclose()
        # It has stopped, although nobody let go.
        with pytest.raises(UnavailableError), mapped_errors("WriteTrajectories"):
            await stream.read()
        acquiring.cancel()


async def test_a_log_that_dies_stops_the_answers(tmp_path: Path) -> None:
    class Broken(AppendFile):
        def sync(self) -> None:
            if segment_path(tmp_path, 1).stat().st_size > 1000:
                raise OSError(5, "Input/output error")
            super().sync()

    async with serving(tmp_path, open_file=Broken) as address, connected(address) as client:
        client.patience_seconds = 5
        await client.open_run(spec(), ROOT, [])
        ticket = (await client.acquire_tickets("s0", ROOT, 2, WAIT_SECONDS))[0][0]
        with pytest.raises(UnavailableError, match=r"segment-00000001\.log: Input/output error"):
            await write(client, filled(ticket))
        with pytest.raises(UnavailableError, match="restart to verify"):
            await write(client, filled(ticket))
