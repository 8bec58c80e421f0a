"""`leeway recompute-step`: what it says when a step cannot be computed again."""

from __future__ import annotations

from leeway.cli.recompute_step import _reason

TORCHRUN: str = """\
recompute-step: rank 1 lost rank 0
recompute-step: 127.0.0.1:1 does not answer
E0101 12:00:00 torch/distributed/elastic/multiprocessing/api.py:1001] failed (exitcode: 2) local_rank: 0
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
"""


def test_the_reason_is_the_last_word_of_the_process_itself() -> None:
    assert _reason(TORCHRUN.splitlines()) == "127.0.0.1:1 does not answer"
    assert _reason(["Traceback", "MemoryError", ""]) == "MemoryError"
    assert _reason([]) == "the process ended without a reason"
