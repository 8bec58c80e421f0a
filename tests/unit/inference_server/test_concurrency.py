"""Slots are handed out in order, never beyond the limit, and the limit follows the engine's load."""

from __future__ import annotations

import asyncio

import pytest

from inference_server.engines.process.concurrency import ConcurrencyLimit, EngineLoad
from leeway.errors import ExhaustedError

QUIET = EngineLoad(num_running=4, num_waiting=0, kv_usage=0.5)


async def hold(limit: ConcurrencyLimit, held: list[int], number: int, release: asyncio.Event) -> None:
    async with limit.slot():
        held.append(number)
        await release.wait()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_slots_go_to_who_came_first_and_no_further() -> None:
    limit, held = ConcurrencyLimit(2, 2), list[int]()
    releases = [asyncio.Event() for _ in range(4)]
    tasks = [asyncio.create_task(hold(limit, held, number, releases[number])) for number in range(4)]
    await settle()
    assert (held, limit.num_waiting) == ([0, 1], 2)
    with pytest.raises(ExhaustedError, match="2 requests wait for one of 2 slots"):
        async with limit.slot():
            pass
    releases[1].set()
    await settle()
    assert (held, limit.num_taken) == ([0, 1, 2], 2)
    for release in releases:
        release.set()
    await asyncio.gather(*tasks)
    assert (held, limit.num_taken) == ([0, 1, 2, 3], 0)


async def test_a_cancelled_wait_leaves_nothing_behind() -> None:
    """Neither while it waits nor in the moment in which it gets its turn."""
    limit, held, release = ConcurrencyLimit(1, 8), list[int](), asyncio.Event()
    release.set()
    async with limit.slot():
        waiting = [asyncio.create_task(hold(limit, held, number, release)) for number in (1, 2, 3)]
        await settle()
        waiting[0].cancel()
        await settle()
    # The slot is number 2's now, which does not know yet.
    waiting[1].cancel()
    await asyncio.wait(waiting)
    assert held == [3]
    assert (limit.num_taken, limit.num_waiting) == (0, 0)


async def test_the_limit_is_cut_when_the_engine_preempts_and_comes_back_one_by_one() -> None:
    limit, release = ConcurrencyLimit(20, 0, patience=3), asyncio.Event()
    limit.observe(EngineLoad(num_running=10, num_waiting=2, kv_usage=1.0, num_preempted=1))
    assert limit.limit == 9
    tasks = [asyncio.create_task(hold(limit, [], number, release)) for number in range(9)]
    await settle()
    for load in (QUIET, QUIET, EngineLoad(9, 1, 0.5), QUIET, QUIET, EngineLoad(9, 0, 0.9), QUIET, QUIET):
        limit.observe(load)
    assert limit.limit == 9  # a queue and a full cache interrupt the quiet
    limit.observe(QUIET)
    assert limit.limit == 10
    release.set()
    await asyncio.gather(*tasks)
    for _ in range(100):
        limit.observe(QUIET)
    assert limit.limit == 10  # nobody asks for more


async def test_a_raised_limit_lets_who_waits_go_on() -> None:
    limit, held, release = ConcurrencyLimit(2, 8, patience=1), list[int](), asyncio.Event()
    limit.observe(EngineLoad(1, 0, 1.0, num_preempted=3))
    assert limit.limit == 1  # never below one
    tasks = [asyncio.create_task(hold(limit, held, number, release)) for number in range(2)]
    await settle()
    assert held == [0]
    limit.observe(QUIET)
    await settle()
    assert held == [0, 1]
    release.set()
    await asyncio.gather(*tasks)


async def test_sequences_that_a_swap_computes_again_are_no_lack_of_memory() -> None:
    """Each that has a slot may be, though the engine has not said yet that it runs."""
    limit, release = ConcurrencyLimit(4, 0), asyncio.Event()
    tasks = [asyncio.create_task(hold(limit, [], number, release)) for number in range(3)]
    await settle()
    limit.observe(EngineLoad(num_running=1, num_waiting=0, kv_usage=0.1))
    limit.forgive()
    limit.observe(EngineLoad(num_running=3, num_waiting=0, kv_usage=0.1, num_preempted=2))
    limit.observe(EngineLoad(num_running=3, num_waiting=0, kv_usage=0.1, num_preempted=1))
    assert limit.limit == 4
    limit.observe(EngineLoad(num_running=3, num_waiting=0, kv_usage=1.0, num_preempted=1))
    assert limit.limit == 2
    release.set()
    await asyncio.gather(*tasks)
