"""Compare the contract with its baseline, the image in proto/baseline.binpb, and say what changed.

    python proto/baseline.py            lists what was added and removed; fails where a change would break callers
    python proto/baseline.py --accept   makes today's contract the baseline

The baseline is the contract that callers and stored logs may rely on. A change that does not break them needs nothing:
accept it with the next one. A change that breaks them is a decision: accept it, and name it in CHANGELOG.md.
`buf breaking` decides what breaks; it runs beside this interpreter (`make env` installs it).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.descriptor_pb2 import DescriptorProto, EnumDescriptorProto, FileDescriptorSet

CONTRACT = Path(__file__).parent
BASELINE = CONTRACT / "baseline.binpb"


def buf(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run buf, which prints one line for each breaking change."""
    program = Path(sys.executable).parent / "buf"
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, check=False, timeout=60)


def elements(image: Path) -> set[str]:
    """Every message, field, enum value and call of an image, each with what its wire form depends on."""
    files = FileDescriptorSet.FromString(image.read_bytes()).file
    found: set[str] = set()
    for file in files:
        if not file.package.startswith("leeway"):
            continue
        for message in file.message_type:
            found.update(_of_message(message, file.package))
        for enum in file.enum_type:
            found.update(_of_enum(enum, file.package))
        for service in file.service:
            for call in service.method:
                streams = ("stream " * call.client_streaming, "stream " * call.server_streaming)
                found.add(
                    f"call {file.package}.{service.name}.{call.name}"
                    f"({streams[0]}{call.input_type}) returns ({streams[1]}{call.output_type})"
                )
    return found


def _of_message(message: DescriptorProto, scope: str) -> Iterator[str]:
    name = f"{scope}.{message.name}"
    yield f"message {name}"
    for field in message.field:
        kind = field.type_name or field.Type.Name(field.type).removeprefix("TYPE_").lower()
        repeated = "repeated " if field.label == field.LABEL_REPEATED else ""
        yield f"field {name}.{field.name} = {field.number} ({repeated}{kind})"
    for inner in message.nested_type:
        yield from _of_message(inner, name)
    for enum in message.enum_type:
        yield from _of_enum(enum, name)


def _of_enum(enum: EnumDescriptorProto, scope: str) -> Iterator[str]:
    return (f"enum value {scope}.{enum.name}.{value.name} = {value.number}" for value in enum.value)


def main() -> int:
    """Compare or accept; returns the exit code."""
    parser = argparse.ArgumentParser(description="Compare the contract with its baseline, and say what changed.")
    parser.add_argument("--accept", action="store_true", help="make today's contract the baseline")
    parser.add_argument("--contract", type=Path, default=CONTRACT, metavar="DIR", help="the .proto files to compare")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        image = Path(directory) / "contract.binpb"
        built = buf("build", str(arguments.contract), "--exclude-source-info", "--output", str(image))
        if built.returncode:
            print(
                f"{arguments.contract}: the contract does not compile:\n{built.stderr or built.stdout}", file=sys.stderr
            )
            return 1
        before, now = elements(BASELINE), elements(image)
        for sign, changed in (("-", before - now), ("+", now - before)):
            for element in sorted(changed):
                print(f"{sign} {element}")
        if arguments.accept:
            BASELINE.write_bytes(image.read_bytes())
            print(f"{BASELINE.name}: accepted {len(now)} elements")
            return 0
    broken = buf("breaking", str(arguments.contract), "--against", str(BASELINE))
    if broken.returncode:
        print(broken.stdout + broken.stderr, end="", file=sys.stderr)
        print(
            "The contract breaks callers of the baseline. Undo the change, or accept it with "
            "`python proto/baseline.py --accept` and name it in CHANGELOG.md",
            file=sys.stderr,
        )
        return 1
    changes = len(before ^ now)
    print(f"contract: {changes} changes since the baseline" if changes else "contract: equal to its baseline")
    return 0


if __name__ == "__main__":
    sys.exit(main())
