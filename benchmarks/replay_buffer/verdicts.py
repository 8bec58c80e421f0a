"""What was promised, against the medians of one run."""

from __future__ import annotations

from benchmarks.replay_buffer.report import Key, Results, verdict
from benchmarks.replay_buffer.throughput import BARE, FILE, KEPT, LEEWAY, REVERB, UNSYNCED
from benchmarks.replay_buffer.workload import WORKLOADS

OF_BARE = 0.75
OF_UNSYNCED = 0.8


def judge(results: Results) -> list[bool]:
    """Print each promise; whether each is kept."""
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
                figure = results.ratio(mine, mine._replace(contender=BARE))
                if per_message == 1:
                    kept.append(verdict(f"{op} of the bare stream, {where}", figure, OF_BARE))
                else:
                    _print(f"{op} of the bare stream, {where}", figure)
                _print(f"{op} of the bare stream that keeps, {where}", results.ratio(mine, mine._replace(contender=KEPT)))
            insert = ours._replace(op="insert")
            kept_stream = insert._replace(contender=KEPT)
            limit = results.ratio(kept_stream, insert._replace(contender=BARE))
            _print(f"of which the bare stream that keeps reaches itself, {where}", limit)
            file = results.ratio(insert, insert._replace(contender=FILE, per_message=workload.per_message[0]))
            _print(f"insert of a plain file's bytes, {where}", file)
            unsynced = results.ratio(insert, insert._replace(contender=UNSYNCED))
            kept.append(verdict(f"insert of the same log without fsync, {where}", unsynced, OF_UNSYNCED))
            if workload.name != "7 KB" or per_message > 1:
                reverb = insert._replace(contender=REVERB, per_message=workload.per_message[0])
                kept.append(verdict(f"insert of Reverb's fastest writer, {where}", results.ratio(insert, reverb), 1.0))
    return kept


def _print(what: str, figure: float | None) -> None:
    """A figure without a promise."""
    if figure is not None:
        print(f"                  {what}: {figure:.2f}x")
