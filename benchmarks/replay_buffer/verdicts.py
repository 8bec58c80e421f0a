"""What was promised, against the medians of one run."""

from __future__ import annotations

from benchmarks.replay_buffer.report import Key, Results, verdict
from benchmarks.replay_buffer.throughput import BARE, FILE, KEPT, LEEWAY, REVERB, UNSYNCED
from benchmarks.replay_buffer.workload import WORKLOADS

OF_BARE = 0.75
OF_UNSYNCED = 0.8


def judge(results: Results) -> list[bool]:
    """Print each promise, with what bounds it; whether each is kept."""
    print()
    kept: list[bool] = []
    for workload in WORKLOADS:
        for per_message in workload.per_message:
            ours = Key(workload.name, workload.count, per_message, LEEWAY)
            if ours._replace(op="insert") not in results.samples:
                continue
            where = f"{workload.name}, {per_message} a message"
            for op in ("insert", "draw"):
                mine = ours._replace(op=op)
                bare, keeping = mine._replace(contender=BARE), mine._replace(contender=KEPT)
                figure = results.ratio(mine, bare)
                if per_message == 1:
                    kept.append(verdict(f"{op} of the bare stream, {where}", figure, OF_BARE))
                else:
                    _print(f"{op} of the bare stream, {where}", figure)
                _print("a bare stream that keeps what comes reaches", results.ratio(keeping, bare))
                _print("we reach of that", results.ratio(mine, keeping))
            insert, once = ours._replace(op="insert"), workload.per_message[0]
            file = insert._replace(contender=FILE, per_message=once)
            _print(f"insert of a plain file's bytes, {where}", results.ratio(insert, file))
            unsynced = results.ratio(insert, insert._replace(contender=UNSYNCED))
            kept.append(verdict(f"insert of the same log without fsync, {where}", unsynced, OF_UNSYNCED))
            if workload.name != "7 KB" or per_message > 1:
                reverb = insert._replace(contender=REVERB, per_message=once)
                kept.append(verdict(f"insert of Reverb's fastest writer, {where}", results.ratio(insert, reverb), 1.0))
                _print("the bare stream reaches", results.ratio(insert._replace(contender=BARE), reverb))
    return kept


def _print(what: str, figure: float | None) -> None:
    """A figure without a promise."""
    if figure is not None:
        print(f"                  {what}: {figure:.2f}x")
