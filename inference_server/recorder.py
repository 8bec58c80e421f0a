"""One trajectory as it is written: the engine's chunks, numbered and chained, then a close or a failure."""

from __future__ import annotations

from dataclasses import replace

from inference_server.engine import GenerationEnd
from leeway import codec
from leeway.errors import InvalidDataError
from leeway.types import (
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
    """Turns what an engine says of one member into write items; `written` follows each before the next is made.

    Args:
        ticket: the loan.
        member: which of its members.
        prompt: int32 [n], the tokens that the engine was given.
        engine: `name/version`, recorded in the MODEL segment.
    """

    def __init__(self, ticket: Ticket, member: TicketMember, prompt: Int32Array, engine: str) -> None:
        self.trajectory_id = member.trajectory_id
        self.attempt = ticket.attempt
        self.sampling: SamplingParams = replace(ticket.sampling, seed=member.seed)
        self.next_seq = 0
        self._prompt = prompt
        self._engine = engine
        self._chain = codec.EMPTY_CHAIN
        self._length = len(prompt)
        self._sampled: list[Int32Array] = []

    @property
    def sampled_token_ids(self) -> list[int]:
        """All sampled token ids so far, the end-of-sequence token included."""
        return [token_id for ids in self._sampled for token_id in ids.tolist()]

    @property
    def num_sampled(self) -> int:
        """Sampled tokens so far."""
        return self._length - len(self._prompt)

    def written(self) -> None:
        """The newest item is on its way: the next one has the next number."""
        self.next_seq += 1

    def chunk(self, chunk: TrajectoryChunk) -> WriteItem:
        """The next chunk. The first one brings the prompt; each one with tokens brings the MODEL segment, grown.

        Raises:
            InvalidDataError: its tokens do not follow those before.
        """
        columns, segments = chunk.columns, chunk.segments
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
        data = codec.encode_chunk(TrajectoryChunk(columns, segments, chunk.version_spans))
        self._chain = codec.chain_digest(self._chain, data)
        return self._item(data)

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
        """The end of a trajectory that could not be finished."""
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

    def _item(self, content: bytes | TrajectoryClose | TrajectoryFailure) -> WriteItem:
        return WriteItem(self.trajectory_id, self.attempt, self.next_seq, content)
