"""Whoever pauses an engine goes on again, or the engine is dead and says so; labels become versions."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inference_server.engine import GenerationEnd, GenerationRequest
from inference_server.engines.process.engine import ProcessEngine
from leeway.errors import DeadlineError, FencedError, InvalidDataError, PreconditionError, UnavailableError
from leeway.types import SamplingParams, TrajectoryChunk, VersionSpan
from tests.deadlines import WAIT_SECONDS
from tests.unit.inference_server.fake_driver import FakeDriver, make_engine, snapshot


def request(num_tokens: int = 2, prompt: int = 3) -> GenerationRequest:
    return GenerationRequest("r", np.full(prompt, 5, np.int32), SamplingParams(1.0, num_tokens, (), 1, 0))


async def collect(engine: ProcessEngine, wanted: GenerationRequest) -> list[TrajectoryChunk | GenerationEnd]:
    async with asyncio.timeout(WAIT_SECONDS):
        return [item async for item in engine.generate(wanted)]


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def begin(command: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    return asyncio.create_task(command)


async def give_up(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


async def ready(staging: Path, **options: Any) -> tuple[ProcessEngine, FakeDriver]:
    """An engine with its first weights; the log begins after them."""
    engine, driver = make_engine(staging, **options)
    await engine.update_weights(snapshot(0))
    driver.log.clear()
    return engine, driver


async def test_spans_name_the_weights_that_sampled(tmp_path: Path) -> None:
    engine, driver = await ready(tmp_path)
    sampling = begin(collect(engine, request(3)))
    await settle()
    driver.step()
    await settle()
    await engine.update_weights(snapshot(1))
    await engine.update_weights(snapshot(2))
    driver.step()
    driver.step()
    *chunks, last, end = await sampling
    versions = [snapshot(step).version for step in range(3)]
    assert isinstance(last, TrajectoryChunk)
    assert last.version_spans == (
        VersionSpan(3, 4, versions[0]),
        VersionSpan(4, 5, versions[2]),
        VersionSpan(5, 6, versions[2]),
    )
    assert isinstance(end, GenerationEnd)
    assert (len(chunks), end.num_tokens) == (2, 3)
    assert engine.info().version == versions[2]
    assert driver.loaded == [0, 1, 2]
    assert names_in(tmp_path) == []  # nothing stays staged


async def test_a_swap_that_nobody_waits_for_any_more_is_finished(tmp_path: Path) -> None:
    engine, driver = await ready(tmp_path)
    driver.held["load"] = asyncio.Event()
    swap = begin(engine.update_weights(snapshot(1)))
    await driver.at("load")
    await give_up(swap)
    driver.held["load"].set()
    await engine.resume()  # comes after it
    assert driver.log == ["pause", "load", "resume", "resume"]
    assert driver.running
    assert engine.info().version == snapshot(1).version


async def test_a_pause_given_up_before_it_is_reached_is_taken_back(tmp_path: Path) -> None:
    engine, driver = await ready(tmp_path)
    driver.held["pause"] = asyncio.Event()
    pause = begin(engine.pause())
    await driver.at("pause")
    await give_up(pause)
    driver.held["pause"].set()
    await settle()
    assert driver.running
    assert driver.log == ["pause", "resume"]


async def test_a_pause_given_up_while_others_command_never_happens(tmp_path: Path) -> None:
    engine, driver = await ready(tmp_path)
    driver.held["load"] = asyncio.Event()
    swap = begin(engine.update_weights(snapshot(1)))
    await driver.at("load")
    pause = begin(engine.pause())
    await settle()
    await give_up(pause)
    driver.held["load"].set()
    await swap
    await settle()
    assert driver.running
    assert driver.log == ["pause", "load", "resume"]


async def test_giving_up_a_second_pause_leaves_the_first(tmp_path: Path) -> None:
    engine, driver = await ready(tmp_path)
    await engine.pause()
    second = begin(engine.pause())
    await asyncio.sleep(0)
    await give_up(second)
    await settle()
    assert not driver.running
    await engine.resume()
    assert driver.running


async def test_going_on_happens_though_nobody_waits_for_it(tmp_path: Path) -> None:
    engine, driver = await ready(tmp_path)
    await engine.pause()
    driver.held["resume"] = asyncio.Event()
    resume = begin(engine.resume())
    await driver.at("resume")
    await give_up(resume)
    driver.held["resume"].set()
    await engine.update_weights(snapshot(1))
    assert driver.running


async def test_a_swap_leaves_a_paused_engine_paused(tmp_path: Path) -> None:
    engine, driver = await ready(tmp_path)
    await engine.pause()
    await engine.update_weights(snapshot(1))
    assert not driver.running
    await engine.resume()
    assert driver.running
    await engine.update_weights(snapshot(2))
    assert driver.running


async def test_commands_of_several_callers_never_mix(tmp_path: Path) -> None:
    engine, driver = await ready(tmp_path)
    async with asyncio.timeout(WAIT_SECONDS):
        await asyncio.gather(
            engine.update_weights(snapshot(1)),
            engine.pause(),
            engine.update_weights(snapshot(2)),
            engine.resume(),
            engine.update_weights(snapshot(3)),
        )
    assert driver.log == ["pause", "load", "resume", "pause", "pause", "load", "resume", "pause", "load", "resume"]
    assert driver.running


@pytest.mark.parametrize("broken", ["pause", "load", "resume"])
async def test_a_swap_that_fails_is_the_engines_death(tmp_path: Path, broken: str) -> None:
    """Nobody knows what it would go on with; everybody who waits is told, and the server ends."""
    engine, driver = await ready(tmp_path)
    watch = begin(engine.watch())
    running = begin(collect(engine, request()))
    await settle()
    driver.step()
    driver.broken.add(broken)
    with pytest.raises(UnavailableError, match="failed at"):
        await engine.update_weights(snapshot(1))
    assert driver.log[-1] == "kill"
    for waiting in (watch, running):
        async with asyncio.timeout(WAIT_SECONDS):
            with pytest.raises(UnavailableError, match=f"{broken} is broken"):
                await waiting
    for command in (engine.pause(), engine.resume(), engine.update_weights(snapshot(0)), collect(engine, request())):
        with pytest.raises(UnavailableError, match=f"{broken} is broken"):
            await command
    assert driver.log.count("kill") == 1
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("stuck", ["pause", "load", "resume"])
async def test_a_command_without_an_answer_is_the_engines_death(tmp_path: Path, stuck: str) -> None:
    engine, driver = await ready(tmp_path)
    engine._command_timeout_seconds = 0.05
    watch = begin(engine.watch())
    running = begin(collect(engine, request()))
    await settle()
    driver.held[stuck] = asyncio.Event()
    with pytest.raises(DeadlineError, match=r"did not reach .* within 0\.05 s"):
        await engine.update_weights(snapshot(1))
    for waiting in (watch, running):
        async with asyncio.timeout(WAIT_SECONDS):
            with pytest.raises(UnavailableError, match="did not reach"):
                await waiting
    driver.held[stuck].set()


async def test_the_server_ends_though_what_failed_cannot_be_killed(tmp_path: Path) -> None:
    engine, driver = await ready(tmp_path)
    driver.killable = False
    driver.broken.add("load")
    with pytest.raises(UnavailableError):
        await engine.update_weights(snapshot(1))
    async with asyncio.timeout(WAIT_SECONDS):
        with pytest.raises(UnavailableError, match="load is broken"):
            await engine.watch()


async def test_an_interrupted_command_is_the_engines_death(tmp_path: Path) -> None:
    """As when the event loop ends with a command on its way."""
    engine, driver = await ready(tmp_path)
    driver.held["load"] = asyncio.Event()
    before = asyncio.all_tasks()
    swap = begin(engine.update_weights(snapshot(1)))
    await driver.at("load")
    for task in asyncio.all_tasks() - before - {swap}:
        task.cancel()
    with pytest.raises(UnavailableError, match="was interrupted at the swap"):
        await swap
    assert driver.log[-1] == "kill"
    with pytest.raises(UnavailableError, match="was interrupted at the swap"):
        await collect(engine, request())


async def test_death_ends_a_command_on_its_way(tmp_path: Path) -> None:
    """An engine that is gone never answers."""
    for end in ("dies", "is closed"):
        engine, driver = await ready(tmp_path)
        watch = begin(engine.watch())
        driver.held["load"] = asyncio.Event()
        swap = begin(engine.update_weights(snapshot(1)))
        await driver.at("load")
        if end == "dies":
            driver._die()
        else:
            await engine.aclose()
        async with asyncio.timeout(WAIT_SECONDS):
            with pytest.raises(UnavailableError, match="Fake has died" if end == "dies" else "the engine stops"):
                await swap
            with pytest.raises(UnavailableError):
                await watch


async def test_death_is_noticed_without_a_request_and_by_those_that_run(tmp_path: Path) -> None:
    engine, driver = await ready(tmp_path)
    running = begin(collect(engine, request()))
    await settle()
    driver._die()
    with pytest.raises(UnavailableError, match="Fake failed while it sampled: gone"):
        await running
    with pytest.raises(UnavailableError, match="Fake failed"):
        await engine.watch()
    idle, idle_driver = await ready(tmp_path)
    idle_driver._die()
    with pytest.raises(UnavailableError, match="Fake has died: it is gone"):
        await idle.watch()


async def test_requests_wait_for_a_swap_and_start_under_the_new_weights(tmp_path: Path) -> None:
    engine, driver = await ready(tmp_path)
    driver.held["load"] = asyncio.Event()
    swap = begin(engine.update_weights(snapshot(1)))
    await driver.at("load")
    waiting = begin(collect(engine, request(1)))
    given_up = begin(collect(engine, request(1)))
    await settle()
    assert not driver.queues
    await give_up(given_up)
    driver.held["load"].set()
    await swap
    await settle()
    assert list(driver.salts.values()) == [2]
    driver.step()
    last = (await waiting)[0]
    assert isinstance(last, TrajectoryChunk)
    assert last.version_spans == (VersionSpan(3, 4, snapshot(1).version),)


async def test_what_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    engine, driver = await ready(tmp_path)
    with pytest.raises(PreconditionError):
        await engine.update_weights(snapshot(1, name="other"))
    with pytest.raises(PreconditionError, match="staging_directory"):
        await (make_engine(tmp_path / "nowhere")[0]).update_weights(snapshot(1))
    assert await engine.update_weights(snapshot(0)) == 0.0  # is in force
    await engine.update_weights(snapshot(1, epoch=3))
    with pytest.raises(FencedError):
        await engine.update_weights(snapshot(2, epoch=2))
    assert driver.log == ["pause", "load", "resume"]


async def test_a_request_is_checked_before_the_engine_sees_it(tmp_path: Path) -> None:
    engine, driver = make_engine(tmp_path)
    with pytest.raises(UnavailableError, match="no weights yet"):
        await collect(engine, request())
    await engine.update_weights(snapshot(0))
    with pytest.raises(InvalidDataError):
        engine.generate(request(prompt=48))
    with pytest.raises(InvalidDataError):
        engine.generate(GenerationRequest("r", np.array([32], np.int32), request().sampling))
    full = begin(collect(engine, request(99, prompt=45)))
    await settle()
    for _ in range(9):
        driver.step()
    end = (await full)[-1]
    assert isinstance(end, GenerationEnd)
    assert end.num_tokens == 3  # the rest of the context


async def test_closing_tells_open_requests(tmp_path: Path) -> None:
    engine, driver = await ready(tmp_path)
    running = begin(collect(engine, request()))
    await settle()
    await engine.aclose()
    with pytest.raises(UnavailableError, match="the engine stops"):
        await running
    assert driver.log == ["close 1"]


async def test_a_request_that_is_given_up_frees_its_slot(tmp_path: Path) -> None:
    engine, driver = await ready(tmp_path)
    running = [begin(collect(engine, request())) for _ in range(3)]
    await settle()
    assert len(driver.queues) == 2
    await give_up(running[0])
    await settle()
    assert len(driver.queues) == 2
    driver.step()
    driver.step()
    await asyncio.gather(*running[1:])
    assert not driver.queues
