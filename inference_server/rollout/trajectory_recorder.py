"""One trajectory as it is written: the engine's chunks, numbered and chained, then a close or a failure.

Routing is held back until there is enough of it to be packed well, or the completion ends. It may follow its tokens.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from inference_server.engine import GenerationEnd
from leeway import codec
from leeway.errors import InvalidDataError
from leeway.types import (
    Array,
    Column,
    ColumnKind,
    Int32Array,
    SamplingParams,
    Segment,
    SegmentKind,
    Ticket,
    TicketMember,
    TrajectoryChunk,
    TrajectoryClose,
    TrajectoryFailure,
    WriteItem,
)


class TrajectoryRecorder:
    """Turns the output of an engine for one trajectory into write items; call `written` after each item.

    Args:
        ticket: gives the attempt and the sampling parameters.
        member: the member of the ticket that this trajectory is.
        prompt: int32 [n], the tokens that the engine was given.
        engine: `name/version`, recorded in the MODEL segment.
        routing_rows: rows of routing that are packed together; 0 writes plain ids as they come.
    """

    def __init__(
        self, ticket: Ticket, member: TicketMember, prompt: Int32Array, engine: str, routing_rows: int = 0
    ) -> None:
        self.trajectory_id = member.trajectory_id
        self.attempt = ticket.attempt
        self.sampling: SamplingParams = replace(ticket.sampling, seed=member.seed)
        self.next_seq = 0
        self._prompt = prompt
        self._engine = engine
        self._chain = codec.EMPTY_CHAIN
        self._length = len(prompt)
        self._sampled: list[Int32Array] = []
        self._routing = _Routing(routing_rows)

    @property
    def sampled_token_ids(self) -> list[int]:
        """All sampled token ids so far, the end-of-sequence token included."""
        return [token_id for ids in self._sampled for token_id in ids.tolist()]

    @property
    def num_sampled(self) -> int:
        """Sampled tokens so far."""
        return self._length - len(self._prompt)

    def written(self) -> None:
        """Count an item that was written: the next one has the next number."""
        self.next_seq += 1

    def chunk(self, chunk: TrajectoryChunk) -> WriteItem:
        """The next chunk. The first one contains the prompt; each one with tokens repeats the grown MODEL segment.

        Raises:
            InvalidDataError: its tokens do not follow those before.
        """
        columns, segments = self._routing.held_back(chunk.columns), chunk.segments
        for column in chunk.columns:
            if column.kind is not ColumnKind.TOKEN_IDS:
                continue
            if column.start_token != self._length:
                raise InvalidDataError(
                    f"{self._engine} sent tokens from {column.start_token} on where token {self._length} comes next"
                )
            self._length = column.end_token
            self._sampled.append(column.values)
            segments = (*segments, self._model_segment())
        if not self.next_seq:
            count = len(self._prompt)
            columns = (Column(ColumnKind.TOKEN_IDS, 0, count, self._prompt), *columns)
            segments = (Segment(SegmentKind.PROMPT, 0, count), *segments)
        return self._chunk(TrajectoryChunk(columns, segments, chunk.version_spans))

    def rest(self) -> WriteItem | None:
        """The routing that is still held back; write it before the close."""
        columns = self._routing.take()
        return self._chunk(TrajectoryChunk(columns)) if columns else None

    def close(self, end: GenerationEnd, reward: float) -> WriteItem:
        """The close that seals all chunks."""
        return self._item(
            TrajectoryClose(
                chunk_count=self.next_seq,
                token_count=self._length,
                digest=self._chain,
                finish_reason=end.finish_reason,
                reward=reward,
                generation_started_at=end.started_at,
                generation_finished_at=end.finished_at,
            )
        )

    def failure(self, failure: TrajectoryFailure) -> WriteItem:
        """The failure that ends a trajectory."""
        return self._item(failure)

    def _model_segment(self) -> Segment:
        return Segment(
            SegmentKind.MODEL,
            len(self._prompt),
            self._length,
            in_loss=True,
            sampling=self.sampling,
            engine=self._engine,
        )

    def _chunk(self, chunk: TrajectoryChunk) -> WriteItem:
        data = codec.encode_chunk(chunk, pack=self._routing.rows > 0)
        self._chain = codec.chain_digest(self._chain, data)
        return self._item(data)

    def _item(self, content: bytes | TrajectoryClose | TrajectoryFailure) -> WriteItem:
        return WriteItem(self.trajectory_id, self.attempt, self.next_seq, content)


class _Routing:
    """Routing that is held back until it is packed."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._columns: list[Column] = []

    def held_back(self, columns: tuple[Column, ...]) -> tuple[Column, ...]:
        """The columns without their routing, or with all of it once there is enough."""
        if not self.rows:
            return columns
        self._columns += [column for column in columns if column.kind is ColumnKind.ROUTING]
        others = tuple(column for column in columns if column.kind is not ColumnKind.ROUTING)
        held = sum(column.end_token - column.start_token for column in self._columns)
        return (*others, *self.take()) if held >= self.rows else others

    def take(self) -> tuple[Column, ...]:
        """All columns held back, adjacent ones joined."""
        columns, self._columns = self._columns, []
        joined: list[list[Column]] = []
        for column in columns:
            if joined and _follows(joined[-1][-1], column):
                joined[-1].append(column)
            else:
                joined.append([column])
        return tuple(
            Column(ColumnKind.ROUTING, run[0].start_token, run[-1].end_token, _concatenated(run)) for run in joined
        )


def _follows(before: Column, column: Column) -> bool:
    same = before.values.dtype == column.values.dtype and before.values.shape[1:] == column.values.shape[1:]
    return same and before.end_token == column.start_token


def _concatenated(columns: list[Column]) -> Array:
    return columns[0].values if len(columns) == 1 else np.concatenate([column.values for column in columns])
