"""All requirements; how they are run, one after the other, each after those that it builds on; results as JUnit."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Final
from xml.etree import ElementTree as ET

from leeway.conformance import refusals, sampling, scheduling, streams, updates
from leeway.conformance.client import Refused
from leeway.conformance.requirement import NotSupportedError, Requirement, Result, Status, Violation
from leeway.conformance.session import Session
from leeway.errors import InvalidDataError
from leeway.service.process import EXIT_FAILED, EXIT_OK

REQUIREMENTS: Final[tuple[Requirement, ...]] = (
    *streams.REQUIREMENTS,
    *sampling.REQUIREMENTS,
    *updates.REQUIREMENTS,
    *refusals.REQUIREMENTS,
    *scheduling.REQUIREMENTS,
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


def exit_code(results: Sequence[Result]) -> int:
    """0 when nothing failed, 1 otherwise."""
    return EXIT_FAILED if any(result.status is Status.FAILED for result in results) else EXIT_OK


def junit(results: Sequence[Result], name: str) -> bytes:
    """JUnit XML: a suite named after the server, a case per requirement; what was not run counts as skipped."""
    suites = ET.Element("testsuites")
    suite = ET.SubElement(
        suites,
        "testsuite",
        name=name,
        tests=str(len(results)),
        failures=str(sum(result.status is Status.FAILED for result in results)),
        skipped=str(sum(result.status in (Status.SKIPPED, Status.NOT_RUN) for result in results)),
        errors="0",
        time=f"{sum(result.seconds for result in results):.3f}",
    )
    for result in results:
        requirement, detail = result.requirement, printable(result.detail)
        case = ET.SubElement(
            suite,
            "testcase",
            classname=f"leeway.conformance.{requirement.id.partition('-')[0].lower()}",
            name=printable(f"{requirement.id} {requirement.title}"),
            time=f"{result.seconds:.3f}",
        )
        if result.status is Status.PASSED:
            ET.SubElement(case, "system-out").text = detail
        else:
            ET.SubElement(case, "failure" if result.status is Status.FAILED else "skipped", message=detail)
    ET.indent(suites)
    return ET.tostring(suites, encoding="utf-8", xml_declaration=True)


def printable(text: str) -> str:
    """One line without control characters: neither XML nor a terminal should get what a foreign server may send."""
    return "".join(character if character.isprintable() else " " for character in text)
