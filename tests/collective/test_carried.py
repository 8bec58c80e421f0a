"""Broadcasts by carriers, staged through a device, here the CPU: what NCCL's path does, but for NCCL and the GPU."""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
import threading
from argparse import Namespace
from collections.abc import Generator, Sequence
from typing import Any

import pytest
import torch

from leeway.errors import ConfigError, UnavailableError
from leeway.weights.broadcast import carried
from leeway.weights.broadcast.carried import Carried
from leeway.weights.broadcast.carrying import Member
from leeway.weights.broadcast.library import Group
from leeway.weights.broadcast.nccl import ENVIRONMENT, nccl
from leeway.weights.broadcast.rendezvous import Rendezvous
from tests.collective.cpu_carrier import ROOT, Cpu, cpu_library
from tests.collective.members import broadcast, formed, prepared
from tests.deadlines import WAIT_SECONDS

PIECE_BYTES = 10_000
SIZES = (0, 1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 70 * PIECE_BYTES + 3)


@pytest.fixture(scope="module")
def libraries() -> Generator[list[Carried]]:
    made = [cpu_library(PIECE_BYTES) for _ in range(3)]
    yield made
    for library in made:
        library.close()


@pytest.fixture
def ready(libraries: list[Carried]) -> list[Carried]:
    prepared(libraries)
    assert all(library.usable for library in libraries)
    return libraries


@pytest.fixture
def meeting() -> Rendezvous:
    return Rendezvous("127.0.0.1")


def parts_of(size_bytes: int) -> list[bytes]:
    """In parts that end anywhere, some of them empty."""
    whole = random.Random(size_bytes).randbytes(size_bytes)
    cuts = sorted(random.Random(0).choices(range(size_bytes + 1), k=5))
    return [whole[start:end] for start, end in zip([0, *cuts], [*cuts, size_bytes], strict=True)]


def all_formed(libraries: Sequence[Carried], patience_seconds: float = WAIT_SECONDS) -> list[Group]:
    groups = formed(libraries, patience_seconds)
    for group in groups:
        assert not isinstance(group, UnavailableError), group
    return [group for group in groups if not isinstance(group, UnavailableError)]


def process_of(library: Carried) -> subprocess.Popen[bytes]:
    assert library._carrier is not None
    return library._carrier._process


def test_every_byte_arrives_and_a_group_is_used_again_and_again(ready: list[Carried]) -> None:
    groups = all_formed(ready)
    for size_bytes in (*SIZES, *reversed(SIZES)):
        parts = parts_of(size_bytes)
        assert broadcast(groups, parts) == [b"".join(parts)] * 2


def test_the_same_carriers_form_other_groups(ready: list[Carried]) -> None:
    processes = [process_of(library).pid for library in ready]
    for members in (ready, ready[:2], [ready[2], ready[0]], ready):
        groups = all_formed(members)
        assert [group.size for group in groups] == [len(members)] * len(members)
        parts = parts_of(25_000)
        assert broadcast(groups, parts) == [b"".join(parts)] * (len(members) - 1)
    assert [process_of(library).pid for library in ready] == processes


@pytest.mark.parametrize(
    ("victim", "how"),
    [(0, signal.SIGKILL), (2, signal.SIGKILL), (2, signal.SIGSTOP)],
    ids=["sender dies", "receiver dies", "receiver hangs"],
)
def test_a_carrier_that_dies_or_hangs_ends_its_group_for_all_and_nothing_else(
    ready: list[Carried], victim: int, how: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[Any] = all_formed(ready)
    process = process_of(ready[victim])

    def strike(index: int) -> None:
        if index == 5:
            process.send_signal(how)

    monkeypatch.setattr(carried, "_GRACE_SECONDS", 0.2)
    groups[victim]._patience_seconds = 4.0  # a machine that stands still for so long only strikes earlier
    for outcome in broadcast(groups, parts_of(100 * PIECE_BYTES), strike):
        assert isinstance(outcome, UnavailableError)
    assert process.wait(WAIT_SECONDS) == -signal.SIGKILL
    prepared(ready)
    parts = parts_of(25_000)
    assert broadcast(all_formed(ready), parts) == [b"".join(parts)] * 2


def test_a_member_that_takes_nothing_ends_the_group_within_the_patience(ready: list[Carried]) -> None:
    sender, *_ = groups = all_formed(ready[:2], patience_seconds=8.0)
    with pytest.raises(UnavailableError):
        list(sender.send([bytes(PIECE_BYTES)]))
    for group in groups:
        group.close()
    prepared(ready)


def test_a_member_leaves_its_group_before_it_forms_another(meeting: Rendezvous) -> None:
    calls: list[str] = []

    class Noting(Cpu):
        def form(self, store: Any, address: tuple[str, int], rank: int, size: int, patience_seconds: float) -> Any:
            calls.append("form")
            return super().form(store, address, rank, size, patience_seconds)

        def leave(self, group: Any) -> None:
            calls.append("leave")

    member = Member(Noting(Namespace(identity="", refuses="", hangs=False)), [torch.zeros(1, dtype=torch.uint8)])
    for number in (1, 2):
        member.form(*meeting.address, number, 0, 1, WAIT_SECONDS)
    assert calls == ["form", "leave", "form"]


def test_who_does_not_come_is_named_and_waited_for_no_longer_than_the_patience(
    ready: list[Carried], meeting: Rendezvous
) -> None:
    with pytest.raises(UnavailableError, match=r"group of 3 .* did not form: rank 1 and rank 2 did not come"):
        ready[0].join(meeting.address, 70, 0, 3, 4.0)
    prepared(ready)


def test_two_members_on_one_device_are_refused_by_name() -> None:
    same = [cpu_library(PIECE_BYTES, "--identity", "GPU-7") for _ in range(2)]
    try:
        prepared(same)
        for outcome in formed(same, WAIT_SECONDS):
            assert isinstance(outcome, UnavailableError)
            assert "ranks 0 and 1 of a broadcast are both on GPU-7" in outcome.message
            assert "CUDA_VISIBLE_DEVICES" in outcome.message
    finally:
        for library in same:
            library.close()


def test_a_group_that_forms_for_ever_is_given_up_and_its_process_killed(
    monkeypatch: pytest.MonkeyPatch, meeting: Rendezvous
) -> None:
    monkeypatch.setattr(carried, "_GRACE_SECONDS", 0.2)
    library = cpu_library(PIECE_BYTES, "--hangs")
    try:
        prepared([library])
        process = process_of(library)
        with pytest.raises(UnavailableError, match=r"said nothing for 0\.5 seconds"):
            library.join(meeting.address, 7, 0, 1, 0.3)
        assert process.wait(WAIT_SECONDS) == -signal.SIGKILL
    finally:
        library.close()


def test_closing_tells_who_waits(meeting: Rendezvous) -> None:
    library = cpu_library(PIECE_BYTES, "--hangs")
    prepared([library])
    failures: list[str] = []

    def join() -> None:
        try:
            library.join(meeting.address, 7, 0, 1, WAIT_SECONDS)
        except UnavailableError as error:
            failures.append(error.message)

    waiting = threading.Thread(target=join)
    waiting.start()
    library.close()
    waiting.join(WAIT_SECONDS)
    assert len(failures) == 1
    assert not library.usable
    with pytest.raises(UnavailableError, match="have ended"):
        library.prepare()


def test_a_carrier_that_dies_while_nothing_is_sent_is_replaced(meeting: Rendezvous) -> None:
    library = cpu_library(PIECE_BYTES)
    try:
        prepared([library])
        process = process_of(library)
        library._program = [sys.executable, "-c", "import signal; signal.pause()", "this one gets never ready"]
        process.kill()
        process.wait(WAIT_SECONDS)
        for _ in range(2):
            assert not library.usable
            assert process_of(library).poll() is None
        with pytest.raises(UnavailableError, match="not ready"):
            library.join(meeting.address, 7, 0, 1, WAIT_SECONDS)
    finally:
        library.close()


def test_a_machine_that_cannot_take_part_says_why_and_starts_nothing_else() -> None:
    library = cpu_library(PIECE_BYTES, "--refuses", "there is no such device; use another")
    try:
        with pytest.raises(ConfigError, match=r"^there is no such device; use another$"):
            library.prepare()
        process = process_of(library)
        assert not library.usable
        assert process_of(library) is process
        assert library.name == ""
    finally:
        library.close()


PARENT = """
import signal
from tests.collective.cpu_carrier import cpu_library
library = cpu_library(1000)
library.prepare()
print(library._carrier._process.pid, flush=True)
signal.pause()
"""


def test_a_carrier_ends_with_the_process_that_started_it() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, cwd=ROOT)
    assert parent.stdout is not None
    with parent.stdout:
        carrier = os.pidfd_open(int(parent.stdout.readline()))
    parent.kill()
    parent.wait(WAIT_SECONDS)
    ended, _, _ = select.select([carrier], [], [], WAIT_SECONDS)
    os.close(carrier)
    assert ended


def test_only_the_carrier_has_the_environment_that_nccl_needs() -> None:
    before = dict(os.environ)
    assert not [name for name in before if name.startswith("TORCH_NCCL_")]
    library = cpu_library(PIECE_BYTES, environment=ENVIRONMENT)
    try:
        library.prepare()
        assert library.name == "cpu/" + " ".join(sorted(ENVIRONMENT))
        assert nccl()._environment == ENVIRONMENT
        assert dict(os.environ) == before
    finally:
        library.close()


def test_nccl_is_refused_where_it_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    library: Any = nccl({"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)})
    try:
        with pytest.raises(
            ConfigError, match=r'^network\.weights: "collective-nccl", but torch .*; .*"collective"'
        ) as said:
            library.prepare()
        assert "\n" not in said.value.message
    finally:
        library.close()
