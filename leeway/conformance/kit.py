"""All requirements, and how they are run: one after the other, each after those that it builds on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Final

from leeway.conformance import (
    information,
    limits,
    logprobs,
    pausing,
    recording,
    refusals,
    seeds,
    stopping,
    streams,
    updates,
    versions,
)
from leeway.conformance.client import Refused
from leeway.conformance.requirement import Requirement, Result, Status
from leeway.conformance.session import Session
from leeway.conformance.violation import NotSupportedError, Violation
from leeway.errors import InvalidDataError

REQUIREMENTS: Final[tuple[Requirement, ...]] = (
    *information.REQUIREMENTS,
    *streams.REQUIREMENTS,
    *recording.REQUIREMENTS,
    *seeds.REQUIREMENTS,
    *logprobs.REQUIREMENTS,
    *updates.REQUIREMENTS,
    *versions.REQUIREMENTS,
    *pausing.REQUIREMENTS,
    *refusals.REQUIREMENTS,
    *limits.REQUIREMENTS,
    *stopping.REQUIREMENTS,
)


async def run(session: Session, requirements: Sequence[Requirement] = REQUIREMENTS) -> AsyncGenerator[Result]:
    """Check every requirement, those that others build on first; yields each result as it comes."""
    by_id = {requirement.id: requirement for requirement in requirements}
    results: dict[str, Result] = {}

    def in_order(requirement: Requirement) -> list[Requirement]:
        needed = [earlier for name in requirement.needs for earlier in in_order(by_id[name])]
        return [*needed, requirement]

    for requirement in requirements:
        for each in in_order(requirement):
            if each.id not in results:
                results[each.id] = result = await _outcome(session, each, results)
                yield result


async def _outcome(session: Session, requirement: Requirement, results: dict[str, Result]) -> Result:
    unmet = [name for name in requirement.needs if results[name].status is not Status.PASSED]
    if unmet:
        skipped = all(results[name].status is Status.SKIPPED for name in unmet)
        status = Status.SKIPPED if skipped else Status.NOT_RUN
        reason = results[unmet[0]].detail if skipped else f"builds on {unmet[0]}, which did not pass"
        return Result(requirement, status, reason, 0.0)
    begun = time.perf_counter()
    status, detail = await _check(session, requirement)
    if status is Status.FAILED:
        await session.recover()
    return Result(requirement, status, detail, time.perf_counter() - begun)


async def _check(session: Session, requirement: Requirement) -> tuple[Status, str]:
    try:
        async with asyncio.timeout(session.options.check_seconds):
            return Status.PASSED, await requirement.check(session)
    except NotSupportedError as reason:
        return Status.SKIPPED, str(reason)
    except (Violation, Refused) as finding:
        return Status.FAILED, str(finding)
    except InvalidDataError as error:
        return Status.FAILED, f"the server sent something malformed: {error.message}"
    except TimeoutError:
        return Status.FAILED, f"no answer within {session.options.check_seconds:g} s"
