"""`python -m benchmarks.routing_wire`: bytes of routing on the wire against its entropy, and how fast it is packed.

Routing is packed column by column, as a rollout worker writes it, and unpacked again; orders are compared. Bytes are
those of the whole column on the wire, framing included. `plain` are ids of a byte or two. `/order0` and `/tuples` are
bytes over the two entropies of benchmarks/routing_wire/entropy.py; the promise is 1.05x the smaller one, at columns of
as many rows as a worker packs together by default. Rates are tokens per CPU second of one core, medians of
--repetitions.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from benchmarks.routing_wire import entropy
from benchmarks.routing_wire.sources import Source, drawn, joined, sortmix8
from leeway import codec
from leeway.codec.routing import pack_routing, unpack_routing
from leeway.config import WorkerOptions
from leeway.types import Array, Column, ColumnKind, TrajectoryChunk

PROMISED_RATIO = 1.05
ROWS = WorkerOptions().routing_rows
GPU_TOKENS_PER_SECOND = 10_000
"""What one GPU server is taken to produce."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One line of the table."""

    source: Source
    promised: bool  # whether the promise is about it
    plain_bits: float  # per id, as the next three
    wire_bits: float
    order0_bits: float
    tuple_bits: float
    pack_rate: float  # tokens per CPU second
    unpack_rate: float

    @property
    def ratio(self) -> float:
        return self.wire_bits / min(self.order0_bits, self.tuple_bits)


def main() -> int:
    """Print a line for each source and the verdicts; 1 when one is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", type=int, default=2048, help="of sortmix8")
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{'':44}  plain  wire  order0  tuples  /order0  /tuples  packed/s  unpacked/s   bits per id; tokens/s")
    lines = [measure(*entry, arguments.repetitions) for entry in sources(arguments.trajectories)]
    return 0 if kept(lines) else 1


def sources(trajectories: int) -> Iterator[tuple[Source, bool]]:
    """Everything that is measured, and whether the promise is about it."""
    real = sortmix8(trajectories)
    yield real, False
    yield joined(real, ROWS), True
    for rows in (64, 256, 1024, 4096, ROWS):
        yield drawn(48, 128, 8, rows), rows == ROWS
    for skew in (0.5, 1.5):
        yield drawn(48, 128, 8, ROWS, skew), True
    yield drawn(32, 8, 2, ROWS), True
    yield drawn(48, 512, 10, ROWS), True


def measure(source: Source, promised: bool, repetitions: int) -> Measured:
    """Pack and unpack a source, and print its line."""
    pooled = source.pooled
    plain = sum(len(on_wire(column, pack=False)) for column in source.columns)
    wire = sum(len(on_wire(column, pack=True)) for column in source.columns)
    packed = [pack_routing(column) for column in source.columns]
    for column, data in zip(source.columns, packed, strict=True):
        if data is not None:
            np.testing.assert_array_equal(unpack_routing(data, column.dtype, column.shape), column)

    def unpack() -> None:
        for column, data in zip(source.columns, packed, strict=True):
            if data is not None:
                unpack_routing(data, column.dtype, column.shape)

    line = Measured(
        source=source,
        promised=promised,
        plain_bits=8 * plain / pooled.size,
        wire_bits=8 * wire / pooled.size,
        order0_bits=entropy.order0(pooled),
        tuple_bits=entropy.tuples(pooled, source.experts),
        pack_rate=len(pooled) / median_seconds(lambda: [pack_routing(one) for one in source.columns], repetitions),
        unpack_rate=len(pooled) / median_seconds(unpack, repetitions),
    )
    print(
        f"{source.name:44}  {line.plain_bits:5.2f} {line.wire_bits:5.2f}"
        f"  {line.order0_bits:6.3f}  {line.tuple_bits:6.3f}"
        f"  {line.wire_bits / line.order0_bits:7.3f}  {line.wire_bits / line.tuple_bits:7.3f}"
        f"  {line.pack_rate:8,.0f}  {line.unpack_rate:10,.0f}",
        flush=True,
    )
    return line


def on_wire(column: Array, *, pack: bool) -> bytes:
    """The column as a chunk of its own."""
    return codec.encode_chunk(TrajectoryChunk((Column(ColumnKind.ROUTING, 0, len(column), column),)), pack=pack)


def median_seconds(action: Callable[[], object], repetitions: int) -> float:
    """CPU seconds of an action; it repeats until a repetition takes long enough to be timed."""
    count, samples = 1, list[float]()
    while len(samples) < repetitions:
        began = time.process_time()
        for _ in range(count):
            action()
        seconds = time.process_time() - began
        if seconds < 0.05:
            count *= 2
        else:
            samples.append(seconds / count)
    return statistics.median(samples)


def kept(lines: list[Measured]) -> bool:
    """Print what is promised and whether it holds."""
    worst = max((line for line in lines if line.promised), key=lambda line: line.ratio)
    small = worst.ratio <= PROMISED_RATIO
    print(f"largest ratio at {ROWS} rows {worst.ratio:.3f} ({worst.source.name}); {PROMISED_RATIO}x {_verdict(small)}")
    for line in lines:
        if not line.promised and line.ratio > PROMISED_RATIO:
            print(f"above it at fewer rows: {line.ratio:.3f} ({line.source.name}): each column brings its own tables")
    own = [line for line in lines if line.source.engine_tokens_per_second is not None]
    fast = True
    for line in own:
        rate = line.source.engine_tokens_per_second or 0.0
        fast = fast and line.pack_rate > rate
        print(f"{line.source.name}: packed {line.pack_rate / rate:.1f}x as fast as the engine's {rate:,.0f} tokens/s")
    slowest = min((line for line in lines if line.source.pooled.shape[1] >= 48), key=lambda line: line.pack_rate)
    fast = fast and slowest.pack_rate > GPU_TOKENS_PER_SECOND
    print(
        f"48 layers: packed at least {slowest.pack_rate / GPU_TOKENS_PER_SECOND:.1f}x as fast as a server of "
        f"{GPU_TOKENS_PER_SECOND:,} tokens/s ({slowest.source.name}); faster than the engine {_verdict(fast)}"
    )
    return small and fast


def _verdict(is_kept: bool) -> str:
    return "kept" if is_kept else "NOT kept"


if __name__ == "__main__":
    sys.exit(main())
