"""Results as JUnit XML and as an exit code."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree as ET

from leeway.conformance.requirement import Result, Status
from leeway.service.process import EXIT_FAILED, EXIT_OK


def exit_code(results: Sequence[Result]) -> int:
    """0 when nothing failed, 1 otherwise."""
    return EXIT_FAILED if any(result.status is Status.FAILED for result in results) else EXIT_OK


def junit(results: Sequence[Result], name: str) -> bytes:
    """JUnit XML: a suite named after the server, a case per requirement; what was not run counts as skipped."""
    suite = ET.Element(
        "testsuite",
        name=name,
        tests=str(len(results)),
        failures=str(sum(result.status is Status.FAILED for result in results)),
        skipped=str(sum(result.status in (Status.SKIPPED, Status.NOT_RUN) for result in results)),
        errors="0",
        time=f"{sum(result.seconds for result in results):.3f}",
    )
    for result in results:
        requirement = result.requirement
        case = ET.SubElement(
            suite,
            "testcase",
            classname=f"leeway.conformance.{requirement.id.partition('-')[0].lower()}",
            name=printable(f"{requirement.id} {requirement.title}"),
            time=f"{result.seconds:.3f}",
        )
        detail = printable(result.detail)
        if result.status is Status.FAILED:
            ET.SubElement(case, "failure", message=detail)
        elif result.status is Status.PASSED:
            ET.SubElement(case, "system-out").text = detail
        else:
            ET.SubElement(case, "skipped", message=detail)
    suites = ET.Element("testsuites")
    suites.append(suite)
    ET.indent(suites)
    return ET.tostring(suites, encoding="utf-8", xml_declaration=True)


def printable(text: str) -> str:
    """One line without control characters: what a foreign server says is neither XML nor a terminal's business."""
    return "".join(character if character.isprintable() else " " for character in text)
