"""Servers that break one requirement of the inference contract each: the arithmetic server with a planted bug.

Each entry of BROKEN names the requirement that it breaks, and only that one, and the bug in a few words.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
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
from leeway.types import FinishReason, PolicyVersion, WeightManifest, WeightSnapshot
from leeway.v1 import common_pb2, inference_pb2, trajectory_pb2
from leeway.weights.digests import weights_digest

Response = inference_pb2.GenerateResponse
Chunk = trajectory_pb2.TrajectoryChunk
TOKENS, LOGPROBS, TOPK_IDS, TOPK_LOGPROBS, ROUTING = 1, 2, 3, 4, 5
TOPK = (TOPK_IDS, TOPK_LOGPROBS)
RAW = inference_pb2.LOGPROB_MODE_RAW


@dataclass(frozen=True)
class Broken:
    """A bug, and the requirement that must notice it."""

    requirement: str
    bug: str
    servicer: type[InferenceServicer] = InferenceServicer
    engine: type[ArithmeticEngine] = ArithmeticEngine
    policy: type[ServedPolicy] = ServedPolicy
    options: dict[str, Any] = field(default_factory=dict)


# Messages changed on their way in or out


def rewriting(
    *,
    info: Callable[[Any], None] = lambda _info: None,
    request: Callable[[Any], None] = lambda _request: None,
    chunk: Callable[[Any, Any, int], None] = lambda _request, _chunk, _number: None,
    finished: Callable[[Any], None] = lambda _finished: None,
    after: Sequence[Response] = (),
) -> type[InferenceServicer]:
    """A service that changes what it says of itself, each request, each chunk with its number, or the end."""

    change_request = request

    class Rewriting(InferenceServicer):
        async def GetServerInfo(self, request: Any, context: Any) -> Any:
            reply = await super().GetServerInfo(request, context)
            info(reply)
            return reply

        async def Generate(self, request: Any, context: Any) -> AsyncIterator[Response]:
            change_request(request)
            number = 0
            async for response in super().Generate(request, context):
                if response.WhichOneof("event") == "chunk":
                    chunk(request, response.chunk, number)
                    number += 1
                else:
                    finished(response.finished)
                yield response
            for response in after:
                yield response

    return Rewriting


def assigning(field: str, value: Any, where: Callable[[Any], bool] = lambda _message: True) -> Callable[[Any], None]:
    """Sets a field, given or made from what was in it, of the messages for which a condition holds."""

    def assign(message: Any) -> None:
        if where(message):
            setattr(message, field, value(getattr(message, field)) if callable(value) else value)

    return assign


def columns(*kinds: int, change: Callable[[Any, int], None]) -> Callable[[Any, Any, int], None]:
    """Changes each column of these kinds, given the length of the prompt."""

    def chunk(request: Any, message: Any, _number: int) -> None:
        for column in message.columns:
            if column.kind in kinds:
                change(column, request.prompt_token_ids.shape[0])

    return chunk


def set_values(column: Any, values: Any) -> None:
    column.values.CopyFrom(codec.array_to_proto(np.ascontiguousarray(values)))


def step_ahead(info: Any) -> None:
    if info.HasField("version"):
        info.version.step += 1


def shifted(_request: Any, chunk: Any, number: int) -> None:
    for column in chunk.columns:
        if number and column.kind in (TOKENS, LOGPROBS):
            column.start_token += 1
            column.end_token += 1


def last_lost(column: Any, prompt: int) -> None:
    if column.end_token >= prompt + 40:
        set_values(column, codec.array_from_proto(column.values)[:-1])
        column.end_token -= 1


def positive_logprob(request: Any, chunk: Any, _number: int) -> None:
    at = request.prompt_token_ids.shape[0] + 38
    for column in chunk.columns:
        if column.kind == LOGPROBS and not request.sampling.topk and column.start_token <= at < column.end_token:
            values = codec.array_from_proto(column.values).copy()
            values[at - column.start_token] = 1.0
            set_values(column, values)


def topk_once(_request: Any, chunk: Any, number: int) -> None:
    if number:
        kept = [column for column in chunk.columns if column.kind not in TOPK]
        del chunk.columns[:]
        chunk.columns.extend(kept)


def upside_down(column: Any, _prompt: int) -> None:
    set_values(column, codec.array_from_proto(column.values)[:, ::-1])


def without_prompt(column: Any, prompt: int) -> None:
    if column.start_token < prompt:
        set_values(column, codec.array_from_proto(column.values)[prompt:])
        column.start_token += prompt


def first_span_lost(_request: Any, chunk: Any, number: int) -> None:
    if not number:
        del chunk.version_spans[-1:]


def next_step(_request: Any, chunk: Any, _number: int) -> None:
    for span in chunk.version_spans:
        span.version.step += 1


def segments(_request: Any, chunk: Any, _number: int) -> None:
    chunk.segments.add(kind=common_pb2.SEGMENT_KIND_MODEL, start_token=0, end_token=1)


def sampling(field: str, value: Any, where: Callable[[Any], bool] = lambda _sampling: True) -> type[InferenceServicer]:
    """Requests are taken with another value of a field of their sampling."""
    assign = assigning(field, value, where)
    return rewriting(request=lambda request: assign(request.sampling))


def prompts(change: Callable[[Any], Any]) -> type[InferenceServicer]:
    """Well-formed prompts are changed."""

    def request(message: Any) -> None:
        try:
            prompt = codec.array_from_proto(message.prompt_token_ids)
        except InvalidDataError:
            return
        if prompt.dtype == np.int32 and prompt.ndim == 1:
            message.prompt_token_ids.CopyFrom(codec.array_to_proto(change(prompt)))

    return rewriting(request=request)


def reason(ended: FinishReason, said: FinishReason) -> type[InferenceServicer]:
    """One reason is reported as another."""
    return rewriting(finished=assigning("finish_reason", int(said), lambda end: end.finish_reason == ended))


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


def claiming(temperature: Callable[[_Sequence], float]) -> type[ArithmeticEngine]:
    """Samples as it should and claims the log-probs of another temperature."""

    class Claiming(ArithmeticEngine):
        def _append_token(self, sequence: _Sequence, weights: ArithmeticWeights, version: PolicyVersion) -> None:
            length, last, claimed_at = sequence.length, sequence.last_token, temperature(sequence)
            super()._append_token(sequence, weights, version)
            claimed = arithmetic.next_distribution(weights, length, last, claimed_at)
            sequence.logprobs[-1] = claimed.logprob(sequence.last_token)
            if sequence.topk_logprobs:
                sequence.topk_logprobs[-1] = [claimed.logprob(candidate) for candidate in sequence.topk_token_ids[-1]]

    return Claiming


def own_temperature(sequence: _Sequence) -> float:
    return sequence.request.sampling.temperature


def flatter_at_one(sequence: _Sequence) -> float:
    return 1.4 if own_temperature(sequence) == 1.0 else own_temperature(sequence)


def raw_after_the_first(sequence: _Sequence) -> float:
    return own_temperature(sequence) if sequence.length == sequence.prompt_length else 1.0


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


_Stage = Callable[[AsyncIterator[Any]], Awaitable[WeightSnapshot]]


def staging(change: Callable[[Any, list[Any], _Stage], Awaitable[WeightSnapshot]]) -> type[InferenceServicer]:
    """Updates are staged otherwise: by a function of the service, the messages received and the right way."""

    class Staging(InferenceServicer):
        async def _stage(self, messages: Any) -> WeightSnapshot:
            return await change(self, [message async for message in messages], super()._stage)

    return Staging


async def sent(*messages: Any) -> AsyncIterator[Any]:
    for message in messages:
        yield message


async def once(service: Any, messages: list[Any], stage: _Stage) -> WeightSnapshot:
    snapshot = await stage(sent(*messages))
    if snapshot.version == service._policy.version:
        raise PreconditionError(f"{snapshot.version} is served already")
    return snapshot


async def copies_while_checking(service: Any, messages: list[Any], stage: _Stage) -> WeightSnapshot:
    """Bytes go into the running weights as they come; a wrong digest is noticed afterwards."""
    header = messages[0].header
    manifest, digest = codec.manifest_from_proto(header.manifest), header.version.digest
    try:
        return await stage(sent(*messages))
    except CorruptDataError:
        if weights_digest(manifest) == digest:
            data = b"".join(message.data for message in messages[1:])
            service._engine._policy = service._engine._policy[0], arithmetic.read_weights(manifest, [data])
        raise


async def believes_the_header(_service: Any, messages: list[Any], stage: _Stage) -> WeightSnapshot:
    """The digest of the version is not compared with the manifest's."""
    header = messages[0].header
    announced = codec.version_from_proto(header.version)
    header.version.digest = weights_digest(codec.manifest_from_proto(header.manifest))
    return replace(await stage(sent(*messages)), version=announced)


async def takes_what_fits(_service: Any, messages: list[Any], stage: _Stage) -> WeightSnapshot:
    """Bytes beyond those of the manifest are ignored."""
    data = b"".join(message.data for message in messages[1:])
    taken = data[: messages[0].header.manifest.size_bytes]
    return await stage(sent(messages[0], inference_pb2.UpdateWeightsRequest(data=taken)))


async def small_messages(_service: Any, messages: list[Any], stage: _Stage) -> WeightSnapshot:
    largest = max(message.ByteSize() for message in messages)
    if largest > 4 << 20:
        raise ExhaustedError(f"received message larger than max ({largest} vs. {4 << 20})")
    return await stage(sent(*messages))


async def tensor_per_message(_service: Any, messages: list[Any], stage: _Stage) -> WeightSnapshot:
    if sum(message.HasField("data") for message in messages) > len(messages[0].header.manifest.tensors):
        raise InvalidDataError("more messages than tensors")
    return await stage(sent(*messages))


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
    Broken("INFO-1", "an engine without its version", rewriting(info=assigning("engine", "arithmetic"))),
    Broken("INFO-2", "log-probs of the raw distribution", rewriting(info=assigning("logprob_mode", RAW))),
    Broken("INFO-3", "names another step than it serves", rewriting(info=step_ahead)),
    Broken("STREAM-1", "a chunk after finished", rewriting(after=[Response(chunk=Chunk())])),
    Broken("STREAM-2", "columns of later chunks are shifted", rewriting(chunk=shifted)),
    Broken("STREAM-3", "the last log-prob is missing", rewriting(chunk=columns(LOGPROBS, change=last_lost))),
    Broken("STREAM-4", "a log-prob above 0", rewriting(chunk=positive_logprob)),
    Broken("STREAM-5", "max_tokens is reported as STOP", reason(FinishReason.LENGTH, FinishReason.STOP)),
    Broken("STREAM-6", "stop tokens are ignored", engine=NeverStops),
    Broken("STREAM-7", "chunks have segments", rewriting(chunk=segments)),
    Broken("STREAM-8", "the likeliest token is always recorded", sampling("topk", lambda topk: max(topk, 1))),
    Broken("RECORD-1", "candidates of the first chunk only", rewriting(chunk=topk_once)),
    Broken(
        "RECORD-2",
        "candidates come likeliest last",
        rewriting(chunk=columns(*TOPK, change=upside_down)),
    ),
    Broken("RECORD-3", "no routing of the prompt", rewriting(chunk=columns(ROUTING, change=without_prompt))),
    Broken("SEED-1", "seeds are ignored", sampling("seed", lambda _seed: random.getrandbits(64))),
    Broken("SEED-2", "a seed becomes a double", sampling("seed", lambda seed: int(float(seed)) % 2**64)),
    Broken("LOGPROB-1", "claims too flat a distribution", engine=claiming(flatter_at_one)),
    Broken("LOGPROB-2", "raw log-probs", engine=claiming(lambda _sequence: 1.0)),
    Broken("LOGPROB-3", "raw log-probs from the second token on", engine=claiming(raw_after_the_first)),
    Broken("UPDATE-1", "acknowledges, but keeps the old weights", engine=KeepsOldWeights),
    Broken("UPDATE-2", "refuses the version it serves", staging(once)),
    Broken("UPDATE-3", "copies while it checks", staging(copies_while_checking)),
    Broken("UPDATE-4", "believes the announced digest", staging(believes_the_header)),
    Broken("UPDATE-5", "ignores surplus bytes", staging(takes_what_fits)),
    Broken("UPDATE-6", "takes the weights of another model", engine=TakesAnyManifest),
    Broken("UPDATE-7", "takes weights of an older learner", engine=NoFenceEither, policy=NoFence),
    Broken("UPDATE-8", "one message per tensor", staging(tensor_per_message)),
    Broken("UPDATE-9", "messages are limited to 4 MiB", staging(small_messages)),
    Broken("VERSION-1", "the first chunk has no span", rewriting(chunk=first_span_lost)),
    Broken("VERSION-2", "labels name the next step", rewriting(chunk=next_step)),
    Broken("VERSION-3", "labels come a token late", engine=LabelsLate),
    Broken("VERSION-3", "labels are made at the end", engine=LabelsAtTheEnd),
    Broken("VERSION-4", "the first sequence after an update has the old label", engine=OldLabelFirst),
    Broken("PAUSE-1", "a pause is only acknowledged", engine=NeverPauses),
    Broken("PAUSE-2", "a pause ends what runs", engine=PauseAborts, options={"token_seconds": 0.001}),
    Broken("PAUSE-3", "a second pause is refused", engine=PausesOnce),
    Broken("ERROR-1", "an empty prompt is an internal error", EmptyIsInternal),
    Broken("ERROR-2", "negative ids are taken for 0", prompts(lambda prompt: np.maximum(prompt, 0))),
    Broken("ERROR-3", "long prompts are cut", prompts(lambda prompt: prompt[:4000] if len(prompt) >= 4096 else prompt)),
    Broken("ERROR-4", "temperature 0 is taken for 1", sampling("temperature", 1.0, lambda each: each.temperature == 0)),
    Broken("ERROR-5", "max_tokens 0 is taken for 1", sampling("max_tokens", lambda tokens: max(tokens, 1))),
    Broken("ERROR-6", "a larger topk is clipped", sampling("topk", lambda topk: min(topk, 20))),
    Broken("ERROR-7", "the message says nothing", Taciturn),
    Broken("LIMIT-1", "a full context is reported as LENGTH", reason(FinishReason.CONTEXT, FinishReason.LENGTH)),
    Broken("LIMIT-2", "surplus requests are UNAVAILABLE", TurnsAway),
    Broken(
        "LIMIT-3",
        "cancelled sequences are decoded to their end",
        engine=KeepsCancelled,
        options={"token_seconds": 0.001},
    ),
)
"""STOP-1 and STOP-2 are about a process; see arithmetic_backend."""
