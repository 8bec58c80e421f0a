"""Servers that break one requirement of the inference contract each: the arithmetic server with a planted bug.

Each entry of BROKEN names the requirement that it breaks, and only that one, and the bug in a few words.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from inference_server.engine import GenerationEnd
from inference_server.engines.arithmetic import ArithmeticEngine, _Sequence
from inference_server.served_policy import ServedPolicy
from inference_server.service import InferenceServicer
from leeway import arithmetic, codec
from leeway.arithmetic import ArithmeticWeights
from leeway.config import ArithmeticEngineOptions
from leeway.errors import (
    CorruptDataError,
    ExhaustedError,
    InvalidDataError,
    LeewayError,
    NotFoundError,
    PreconditionError,
    UnavailableError,
)
from leeway.types import (
    FinishReason,
    PolicyVersion,
    WeightManifest,
    WeightSnapshot,
)
from leeway.v1 import common_pb2, inference_pb2, trajectory_pb2
from leeway.weights.digests import weights_digest

Response = inference_pb2.GenerateResponse
Chunk = trajectory_pb2.TrajectoryChunk
TOKENS, LOGPROBS, TOPK_IDS, TOPK_LOGPROBS, ROUTING = 1, 2, 3, 4, 5


@dataclass(frozen=True)
class Broken:
    """A bug, and the requirement that must notice it."""

    requirement: str
    bug: str
    servicer: type[InferenceServicer] = InferenceServicer
    engine: type[ArithmeticEngine] = ArithmeticEngine
    policy: type[ServedPolicy] = ServedPolicy
    options: dict[str, Any] = field(default_factory=dict)


# What is sent, rewritten on its way out


class Rewriting(InferenceServicer):
    """Changes the request on its way in and each response on its way out."""

    def request(self, request: Any) -> Any:
        return request

    def chunk(self, request: Any, chunk: Any, number: int) -> None:
        pass

    def finished(self, request: Any, finished: Any) -> None:
        pass

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Response]:
        number = 0
        async for response in super().Generate(self.request(request), context):
            if response.WhichOneof("event") == "chunk":
                self.chunk(request, response.chunk, number)
                number += 1
            else:
                self.finished(request, response.finished)
            yield response


class NamelessEngine(InferenceServicer):
    async def GetServerInfo(self, request: Any, context: Any) -> Any:
        info = await super().GetServerInfo(request, context)
        info.engine = "arithmetic"
        return info


class RawMode(InferenceServicer):
    async def GetServerInfo(self, request: Any, context: Any) -> Any:
        info = await super().GetServerInfo(request, context)
        info.logprob_mode = inference_pb2.LOGPROB_MODE_RAW
        return info


class StepAhead(InferenceServicer):
    async def GetServerInfo(self, request: Any, context: Any) -> Any:
        info = await super().GetServerInfo(request, context)
        if info.HasField("version"):
            info.version.step += 1
        return info


class LastWord(InferenceServicer):
    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Response]:
        async for response in super().Generate(request, context):
            yield response
        yield Response(chunk=Chunk())


class Gap(Rewriting):
    def chunk(self, request: Any, chunk: Any, number: int) -> None:
        for column in chunk.columns:
            if number and column.kind in (TOKENS, LOGPROBS):
                column.start_token += 1
                column.end_token += 1


class LogprobLost(Rewriting):
    def chunk(self, request: Any, chunk: Any, number: int) -> None:
        for column in chunk.columns:
            if column.kind == LOGPROBS and column.end_token >= request.prompt_token_ids.shape[0] + 40:
                _cut(column, 1)


class PositiveLogprob(Rewriting):
    def chunk(self, request: Any, chunk: Any, number: int) -> None:
        at = request.prompt_token_ids.shape[0] + 38
        for column in chunk.columns:
            if column.kind == LOGPROBS and not request.sampling.topk and column.start_token <= at < column.end_token:
                values = codec.array_from_proto(column.values).copy()
                values[at - column.start_token] = 1.0
                column.values.CopyFrom(codec.array_to_proto(values))


class LengthAsStop(Rewriting):
    def finished(self, request: Any, finished: Any) -> None:
        if finished.finish_reason == FinishReason.LENGTH:
            finished.finish_reason = int(FinishReason.STOP)


class ContextAsLength(Rewriting):
    def finished(self, request: Any, finished: Any) -> None:
        if finished.finish_reason == FinishReason.CONTEXT:
            finished.finish_reason = int(FinishReason.LENGTH)


class Segments(Rewriting):
    def chunk(self, request: Any, chunk: Any, number: int) -> None:
        chunk.segments.add(kind=common_pb2.SEGMENT_KIND_MODEL, start_token=0, end_token=1)


class AlwaysTopk(Rewriting):
    def request(self, request: Any) -> Any:
        request.sampling.topk = max(request.sampling.topk, 1)
        return request


class TopkOnce(Rewriting):
    def chunk(self, request: Any, chunk: Any, number: int) -> None:
        if number:
            kept = [column for column in chunk.columns if column.kind not in (TOPK_IDS, TOPK_LOGPROBS)]
            del chunk.columns[:]
            chunk.columns.extend(kept)


class TopkUpsideDown(Rewriting):
    def chunk(self, request: Any, chunk: Any, number: int) -> None:
        for column in chunk.columns:
            if column.kind in (TOPK_IDS, TOPK_LOGPROBS):
                values = np.ascontiguousarray(codec.array_from_proto(column.values)[:, ::-1])
                column.values.CopyFrom(codec.array_to_proto(values))


class RoutingOfCompletionOnly(Rewriting):
    def chunk(self, request: Any, chunk: Any, number: int) -> None:
        for column in chunk.columns:
            if column.kind == ROUTING and not number:
                prompt = request.prompt_token_ids.shape[0]
                values = codec.array_from_proto(column.values)[prompt:]
                column.start_token += prompt
                column.values.CopyFrom(codec.array_to_proto(np.ascontiguousarray(values)))


class SpanLost(Rewriting):
    def chunk(self, request: Any, chunk: Any, number: int) -> None:
        if not number:
            del chunk.version_spans[-1:]


class NextStepLabel(Rewriting):
    def chunk(self, request: Any, chunk: Any, number: int) -> None:
        for span in chunk.version_spans:
            span.version.step += 1


def _cut(column: Any, count: int) -> None:
    values = codec.array_from_proto(column.values)[:-count]
    column.end_token -= count
    column.values.CopyFrom(codec.array_to_proto(values))


# Requests taken otherwise than they were meant


class OwnSeeds(Rewriting):
    def request(self, request: Any) -> Any:
        request.sampling.seed = random.getrandbits(64)
        return request


class DoubleSeeds(Rewriting):
    def request(self, request: Any) -> Any:
        request.sampling.seed = int(float(request.sampling.seed)) % 2**64
        return request


class TakesNegativeIds(Rewriting):
    def request(self, request: Any) -> Any:
        try:
            prompt = codec.array_from_proto(request.prompt_token_ids)
        except InvalidDataError:
            return request
        if prompt.dtype == np.int32:
            request.prompt_token_ids.CopyFrom(codec.array_to_proto(np.maximum(prompt, 0)))
        return request


class TruncatesPrompts(Rewriting):
    def request(self, request: Any) -> Any:
        if request.prompt_token_ids.shape and request.prompt_token_ids.shape[0] >= 4096:
            prompt = codec.array_from_proto(request.prompt_token_ids)
            request.prompt_token_ids.CopyFrom(codec.array_to_proto(prompt[:4000]))
        return request


class ColdIsWarm(Rewriting):
    def request(self, request: Any) -> Any:
        if request.sampling.temperature == 0:
            request.sampling.temperature = 1.0
        return request


class NoneIsOne(Rewriting):
    def request(self, request: Any) -> Any:
        request.sampling.max_tokens = max(request.sampling.max_tokens, 1)
        return request


class TopkClipped(Rewriting):
    def request(self, request: Any) -> Any:
        request.sampling.topk = min(request.sampling.topk, 20)
        return request


class EmptyIsInternal(InferenceServicer):
    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Response]:
        try:
            async for response in super().Generate(request, context):
                yield response
        except InvalidDataError as error:
            raise (LeewayError(error.message) if "empty" in error.message else error) from error


class Taciturn(InferenceServicer):
    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Response]:
        try:
            codec.array_from_proto(request.prompt_token_ids)
        except InvalidDataError:
            raise InvalidDataError("bad request") from None
        async for response in super().Generate(request, context):
            yield response


class TurnsAway(InferenceServicer):
    in_flight = 0

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Response]:
        if self.in_flight >= 12:  # of 8 decoded at once
            raise UnavailableError("come back later")
        self.in_flight += 1
        try:
            async for response in super().Generate(request, context):
                yield response
        finally:
            self.in_flight -= 1


# Sampling and labels


class Claiming(ArithmeticEngine):
    """Samples as it should and claims the log-probs of another temperature."""

    def claimed_temperature(self, sequence: _Sequence) -> float:
        return sequence.request.sampling.temperature

    def _append_token(self, sequence: _Sequence, weights: ArithmeticWeights, version: PolicyVersion) -> None:
        length, last = sequence.length, sequence.last_token
        temperature = self.claimed_temperature(sequence)
        super()._append_token(sequence, weights, version)
        claimed = arithmetic.next_distribution(weights, length, last, temperature)
        sequence.logprobs[-1] = claimed.logprob(sequence.last_token)
        if sequence.topk_logprobs:
            sequence.topk_logprobs[-1] = [claimed.logprob(candidate) for candidate in sequence.topk_token_ids[-1]]


class FlatterAtOne(Claiming):
    def claimed_temperature(self, sequence: _Sequence) -> float:
        temperature = sequence.request.sampling.temperature
        return 1.4 if temperature == 1.0 else temperature


class RawLogprobs(Claiming):
    def claimed_temperature(self, sequence: _Sequence) -> float:
        return 1.0


class RawAfterTheFirst(Claiming):
    def claimed_temperature(self, sequence: _Sequence) -> float:
        return sequence.request.sampling.temperature if sequence.length == sequence.prompt_length else 1.0


class NeverStops(ArithmeticEngine):
    @staticmethod
    def _finish_reason(sequence: _Sequence) -> FinishReason | None:
        request = replace(sequence.request, sampling=replace(sequence.request.sampling, stop_token_ids=()))
        return ArithmeticEngine._finish_reason(replace(sequence, request=request))


class LabelsLate(ArithmeticEngine):
    """A token is labelled with the version that sampled the one before."""

    def __init__(self, options: ArithmeticEngineOptions) -> None:
        super().__init__(options)
        self.previous: dict[_Sequence, PolicyVersion] = {}

    def _append_token(self, sequence: _Sequence, weights: ArithmeticWeights, version: PolicyVersion) -> None:
        super()._append_token(sequence, weights, self.previous.get(sequence, version))
        self.previous[sequence] = version


class LabelsAtTheEnd(ArithmeticEngine):
    """All tokens of a chunk are labelled with the version that is served when it is sent."""

    @staticmethod
    def _end_span(sequence: _Sequence) -> None:
        pass

    def _emit(self, sequence: _Sequence, *, last: bool) -> None:
        if last:
            sequence.span_start = sequence.prompt_length
            ArithmeticEngine._end_span(sequence)
            sequence.span_version = None
        super()._emit(sequence, last=last)


class OldLabelFirst(ArithmeticEngine):
    """The first sequence that begins after an update is labelled with the version before."""

    before: PolicyVersion | None = None

    async def update_weights(self, snapshot: WeightSnapshot) -> float:
        before = self._policy[0] if self._policy else None
        seconds = await super().update_weights(snapshot)
        self.before = before if before != snapshot.version else None
        return seconds

    def _append_token(self, sequence: _Sequence, weights: ArithmeticWeights, version: PolicyVersion) -> None:
        if self.before is not None and sequence.length == sequence.prompt_length:
            version, self.before = self.before, None
        super()._append_token(sequence, weights, version)


# Weights


class KeepsOldWeights(ArithmeticEngine):
    async def update_weights(self, snapshot: WeightSnapshot) -> float:
        before = self._policy
        seconds = await super().update_weights(snapshot)
        if before is not None:
            self._policy = snapshot.version, before[1]
        return seconds


class TakesAnyManifest(ArithmeticEngine):
    async def update_weights(self, snapshot: WeightSnapshot) -> float:
        entries = tuple(replace(entry, name="arithmetic.weight") for entry in snapshot.manifest.tensors)
        return await super().update_weights(replace(snapshot, manifest=WeightManifest(entries)))


class NoFence(ServedPolicy):
    def raise_fence(self, publisher_epoch: int) -> None:
        pass


class NoFenceEither(ArithmeticEngine):
    async def update_weights(self, snapshot: WeightSnapshot) -> float:
        self._highest_epoch = 0
        return await super().update_weights(snapshot)


class Once(InferenceServicer):
    """An update to the version that is served is refused."""

    async def _stage(self, messages: Any) -> WeightSnapshot:
        snapshot = await super()._stage(messages)
        if snapshot.version == self._policy.version:
            raise PreconditionError(f"{snapshot.version} is served already")
        return snapshot


class CopiesWhileChecking(InferenceServicer):
    """Bytes go into the running weights as they come; a wrong digest is noticed afterwards."""

    async def _stage(self, messages: Any) -> WeightSnapshot:
        header, data = await _received(messages)
        manifest = codec.manifest_from_proto(header.manifest)
        version = codec.version_from_proto(header.version)
        try:
            return await super()._stage(_sent(header, data))
        except CorruptDataError:
            engine: Any = self._engine
            if weights_digest(manifest) == version.digest:
                engine._policy = engine._policy[0], arithmetic.read_weights(manifest, [data])
            raise


class BelievesTheHeader(InferenceServicer):
    """The digest of the version is not compared with the manifest's."""

    async def _stage(self, messages: Any) -> WeightSnapshot:
        header, data = await _received(messages)
        announced = codec.version_from_proto(header.version)
        header.version.digest = weights_digest(codec.manifest_from_proto(header.manifest))
        return replace(await super()._stage(_sent(header, data)), version=announced)


class TakesWhatFits(InferenceServicer):
    """Bytes beyond those of the manifest are ignored."""

    async def _stage(self, messages: Any) -> WeightSnapshot:
        header, data = await _received(messages)
        return await super()._stage(_sent(header, data[: header.manifest.size_bytes]))


class SmallMessages(InferenceServicer):
    async def _stage(self, messages: Any) -> WeightSnapshot:
        async def received() -> AsyncIterator[Any]:
            async for message in messages:
                if message.ByteSize() > 4 << 20:
                    raise ExhaustedError(f"received message larger than max ({message.ByteSize()} vs. {4 << 20})")
                yield message

        return await super()._stage(received())


class TensorPerMessage(InferenceServicer):
    async def _stage(self, messages: Any) -> WeightSnapshot:
        received = [message async for message in messages]
        if sum(message.HasField("data") for message in received) > len(received[0].header.manifest.tensors):
            raise InvalidDataError("more messages than tensors")

        async def again() -> AsyncIterator[Any]:
            for message in received:
                yield message

        return await super()._stage(again())


async def _received(messages: Any) -> tuple[Any, bytes]:
    header = (await anext(messages)).header
    return header, b"".join([message.data async for message in messages])


async def _sent(header: Any, data: bytes) -> AsyncIterator[Any]:
    yield inference_pb2.UpdateWeightsRequest(header=header)
    yield inference_pb2.UpdateWeightsRequest(data=data)


# Pausing and slots


class NeverPauses(ArithmeticEngine):
    async def pause(self) -> None:
        pass


class PauseAborts(ArithmeticEngine):
    async def pause(self) -> None:
        await super().pause()
        for sequence in self._active:
            sequence.ended = True
            now = datetime.now(UTC)
            count = sequence.length - sequence.prompt_length
            self._emit(sequence, last=True)
            sequence.events.put_nowait(GenerationEnd(FinishReason.ABORTED, count, now, now))
        self._active = []


class PausesOnce(ArithmeticEngine):
    async def pause(self) -> None:
        if not self._running.is_set():
            raise NotFoundError("nothing is decoded")
        await super().pause()


class KeepsCancelled(ArithmeticEngine):
    def _forget(self, sequence: _Sequence) -> None:
        pass


BROKEN: Sequence[Broken] = (
    Broken("INFO-1", "an engine without its version", NamelessEngine),
    Broken("INFO-2", "log-probs of the raw distribution", RawMode),
    Broken("INFO-3", "names another step than it serves", StepAhead),
    Broken("STREAM-1", "a chunk after finished", LastWord),
    Broken("STREAM-2", "columns of later chunks are shifted", Gap),
    Broken("STREAM-3", "the last log-prob is missing", LogprobLost),
    Broken("STREAM-4", "a log-prob above 0", PositiveLogprob),
    Broken("STREAM-5", "max_tokens is reported as STOP", LengthAsStop),
    Broken("STREAM-6", "stop tokens are ignored", engine=NeverStops),
    Broken("STREAM-7", "chunks have segments", Segments),
    Broken("STREAM-8", "the likeliest token is always recorded", AlwaysTopk),
    Broken("RECORD-1", "candidates of the first chunk only", TopkOnce),
    Broken("RECORD-2", "candidates come likeliest last", TopkUpsideDown),
    Broken("RECORD-3", "no routing of the prompt", RoutingOfCompletionOnly),
    Broken("SEED-1", "seeds are ignored", OwnSeeds),
    Broken("SEED-2", "a seed becomes a double", DoubleSeeds),
    Broken("LOGPROB-1", "claims too flat a distribution", engine=FlatterAtOne),
    Broken("LOGPROB-2", "raw log-probs", engine=RawLogprobs),
    Broken("LOGPROB-3", "raw log-probs from the second token on", engine=RawAfterTheFirst),
    Broken("UPDATE-1", "acknowledges, but keeps the old weights", engine=KeepsOldWeights),
    Broken("UPDATE-2", "refuses the version it serves", Once),
    Broken("UPDATE-3", "copies while it checks", CopiesWhileChecking),
    Broken("UPDATE-4", "believes the announced digest", BelievesTheHeader),
    Broken("UPDATE-5", "ignores surplus bytes", TakesWhatFits),
    Broken("UPDATE-6", "takes the weights of another model", engine=TakesAnyManifest),
    Broken("UPDATE-7", "takes weights of an older learner", engine=NoFenceEither, policy=NoFence),
    Broken("UPDATE-8", "one message per tensor", TensorPerMessage),
    Broken("UPDATE-9", "messages are limited to 4 MiB", SmallMessages),
    Broken("VERSION-1", "the first chunk has no span", SpanLost),
    Broken("VERSION-2", "labels name the next step", NextStepLabel),
    Broken("VERSION-3", "labels come a token late", engine=LabelsLate),
    Broken("VERSION-3", "labels are made at the end", engine=LabelsAtTheEnd),
    Broken("VERSION-4", "the first sequence after an update has the old label", engine=OldLabelFirst),
    Broken("PAUSE-1", "a pause is only acknowledged", engine=NeverPauses),
    Broken("PAUSE-2", "a pause ends what runs", engine=PauseAborts, options={"token_seconds": 0.001}),
    Broken("PAUSE-3", "a second pause is refused", engine=PausesOnce),
    Broken("ERROR-1", "an empty prompt is an internal error", EmptyIsInternal),
    Broken("ERROR-2", "negative ids are taken for 0", TakesNegativeIds),
    Broken("ERROR-3", "long prompts are cut", TruncatesPrompts),
    Broken("ERROR-4", "temperature 0 is taken for 1", ColdIsWarm),
    Broken("ERROR-5", "max_tokens 0 is taken for 1", NoneIsOne),
    Broken("ERROR-6", "a larger topk is clipped", TopkClipped),
    Broken("ERROR-7", "the message says nothing", Taciturn),
    Broken("LIMIT-1", "a full context is reported as LENGTH", ContextAsLength),
    Broken("LIMIT-2", "surplus requests are UNAVAILABLE", TurnsAway),
    Broken(
        "LIMIT-3",
        "cancelled sequences are decoded to their end",
        engine=KeepsCancelled,
        options={"token_seconds": 0.001},
    ),
)
"""STOP-1 and STOP-2 are about a process; see arithmetic_backend."""
