"""What is fuzzed: each target takes one input and lets through nothing but LeewayErrors.

ReplayTarget      every RPC of the replay buffer, as handlers, on a buffer that does real work in between
PolicyTarget      FetchWeights and WatchPolicy of the learner
InferenceTarget   every RPC of an inference server
RecordTarget      payloads of log records
SegmentTarget     the log reader on damaged segments
DirectoryTarget   a whole start on a damaged directory: segments, index, snapshots, generation
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, Final, Protocol

import numpy as np
from google.protobuf.message import Message
from prometheus_client import CollectorRegistry

from inference_server.engines.arithmetic import ArithmeticEngine
from inference_server.served_policy import ServedPolicy
from inference_server.service import InferenceServicer
from learner.weights.publisher import Publisher
from leeway import arithmetic, codec
from leeway.config import ArithmeticEngineOptions
from leeway.errors import LeewayError
from leeway.service.metrics import LearnerMetrics
from leeway.types import Evaluation, SamplingParams, WeightSnapshot, WriteItem
from leeway.v1 import inference_pb2, policy_pb2, replay_pb2, trajectory_pb2
from replay_buffer.storage.records import decode
from replay_buffer.storage.segments import frame, verify_segment
from tests.harness import replay_builders as builders
from tests.harness.arithmetic_law import policy_version
from tests.harness.handler_calls import Context, Harness
from tests.harness.inputs import Inputs

WRITE: Final = "WriteTrajectories"
_PATIENCE_SECONDS: Final = 60.0
"""By the wall clock, on a machine that may be busy; a call that computes for long is found by its CPU time."""


class Target(Protocol):
    """Something that takes inputs."""

    def try_one(self) -> str:
        """Take one input; returns what came of it, in a word. Raises whatever is not a LeewayError."""
        ...

    def close(self) -> None:
        """Leave nothing behind."""
        ...


class Stuck(Exception):
    """A call that should have ended has not."""


class ReplayTarget:
    """A buffer, its service's handlers, and a little honest work so that inputs meet a state worth attacking."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self.inputs = Inputs(rng)
        self._methods = replay_pb2.DESCRIPTOR.services_by_name["ReplayService"].methods
        self._spec = builders.spec(groups_per_step=3, members=2, total_steps=1 << 30, max_attempts=1000)
        self._done = 0
        self._begin()
        self._work()

    def _begin(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="fuzz-"))
        self.harness = Harness(self._directory)
        self._epoch = self._evaluations = 0
        self._head: Any = builders.ROOT
        self._open: list[tuple[str, int]] = []  # trajectories that wait for chunks

    def try_one(self) -> str:
        self._done += 1
        if self._done % 100 == 0:
            self._work()
        if self._rng.random() < 0.01:
            return self._wild_run()
        if self._open and self._rng.random() < 0.05:
            return self._damaged_trajectory()
        method = self._rng.choice(self._methods)
        if self._rng.random() < 0.4:
            method = self._methods_by_name(WRITE)
        request = self.inputs.message(method.input_type)
        if request is None:
            return "no message"
        return self.harness.do(self._judged(method, request), 4 * _PATIENCE_SECONDS)

    def _methods_by_name(self, name: str) -> Any:
        return replay_pb2.DESCRIPTOR.services_by_name["ReplayService"].methods_by_name[name]

    async def _judged(self, method: Any, request: Any) -> str:
        task = asyncio.ensure_future(self._call(method, request))
        waits = getattr(request, "wait", None)
        may_wait = waits is not None and (waits.seconds > 0 or waits.nanos > 0)
        _, pending = await asyncio.wait({task}, timeout=0.002 if may_wait else _PATIENCE_SECONDS)
        if pending:
            task.cancel()
            await asyncio.wait({task})
            if not may_wait:
                raise Stuck(f"{method.name} does not end")
            return "waited"
        try:
            task.result()
        except LeewayError as error:
            return type(error).__name__
        return "done"

    async def _call(self, method: Any, request: Any) -> None:
        handler = getattr(self.harness.service, method.name)
        argument = _stream([self._sent(request)]) if method.client_streaming else request
        answer = handler(argument, Context(0.0))
        if hasattr(answer, "__aiter__"):
            async for _ in answer:
                pass
        else:
            await answer

    def _sent(self, request: Message) -> bytes:
        """A write as its handler gets it: bytes, which nobody has parsed."""
        data = request.SerializeToString()
        return self.inputs.damaged(data) if self._rng.random() < 0.3 else data

    def _damaged_trajectory(self) -> str:
        """Chunks that are wrong inside, sealed by a close that is right about their bytes."""
        rng = self._rng
        trajectory_id, attempt = self._open.pop()
        descriptor = trajectory_pb2.TrajectoryChunk.DESCRIPTOR
        chunks: list[bytes] = []
        for _ in range(rng.choice((1, 1, 2))):
            made = self.inputs.message(descriptor)
            chunks.append(b"" if made is None else made.SerializeToString())
        if rng.random() < 0.3:
            chunks[0] = self.inputs.damaged(builders.chunk([self._head]))
        close = builders.close(chunks, reward=rng.choice((0.0, 1.0, float("nan"))), token_count=rng.choice((7, 2**31)))
        items = [WriteItem(trajectory_id, attempt, seq, part) for seq, part in enumerate([*chunks, close])]
        request = replay_pb2.WriteTrajectoriesRequest(
            run=builders.RUN, server_id="s", items=[codec.item_to_proto(item) for item in items]
        )
        outcome = self.harness.do(self._judged(self._methods_by_name(WRITE), request), 4 * _PATIENCE_SECONDS)
        return f"trajectory {outcome}"

    def _wild_run(self) -> str:
        """A run, an evaluation and a request for work whose numbers are all that the wire can carry."""
        rng, name = self._rng, f"wild{self._done}"
        spec = codec.spec_to_proto(builders.spec(name))
        numbers = (1, 2, 3, 1000, 4096, 2**16, rng.choice((0, 2**32 - 1)))
        for field in ("groups_per_step", "members", "max_staleness", "max_attempts"):
            setattr(spec, field, rng.choice(numbers))
        for field in ("total_steps", "seed", "train_task_count"):
            setattr(spec, field, rng.choice((*numbers, 2**40, 2**63 - 1, 2**64 - 1)))
        evaluation = replay_pb2.CreateEvaluationRequest(
            run=name,
            epoch=1,
            evaluation_id="e",
            version=spec.root,
            task_count=rng.choice((*numbers, 2**40, 2**64 - 1)),
            members=rng.choice(numbers),
            sampling=spec.sampling,
        )
        tickets = replay_pb2.AcquireTicketsRequest(
            run=name, server_id="s", version=spec.root, max_members=rng.choice(numbers)
        )
        outcome = ""
        for method, request in (
            ("OpenRun", replay_pb2.OpenRunRequest(spec=spec, checkpoint=spec.root)),
            *((("CreateEvaluation", evaluation),) if rng.random() < 0.5 else ()),
            ("AcquireTickets", tickets),
            ("AwaitEvaluation", replay_pb2.AwaitEvaluationRequest(run=name, evaluation_id="e")),
            ("DrawBatch", replay_pb2.DrawBatchRequest(run=name, epoch=1, step=1)),
            ("FinishRun", replay_pb2.FinishRunRequest(run=name, epoch=1, give_up=rng.random() < 0.5)),
        ):
            outcome = self.harness.do(self._judged(self._methods_by_name(method), request), 4 * _PATIENCE_SECONDS)
        return f"wild {outcome}"

    # Honest work

    def _work(self) -> None:
        """A few good calls, each of them material for bad ones."""
        try:
            self._step()
        except LeewayError:
            # An input has ended the run, or changed what the honest ones count on: a new buffer.
            self.close()
            self._begin()
            self._step()

    def _step(self) -> None:
        opened = self._good(
            "OpenRun",
            replay_pb2.OpenRunRequest(
                spec=codec.spec_to_proto(self._spec), checkpoint=codec.version_to_proto(self._head)
            ),
        )
        self._epoch = opened.epoch
        run, root = builders.RUN, codec.version_to_proto(self._head)
        self._good(
            "JoinRun",
            replay_pb2.JoinRunRequest(
                run=run,
                server_id="s",
                signature=codec.signature_to_proto(self._spec.signature),
                dataset_digest=self._spec.dataset_digest,
            ),
        )
        self._evaluations += 1
        evaluation = Evaluation(f"e{self._evaluations}", self._head, 1, 1, SamplingParams(max_tokens=4))
        self._good("CreateEvaluation", codec.evaluation_to_proto(evaluation, self._epoch))
        tickets = self._good(
            "AcquireTickets",
            replay_pb2.AcquireTicketsRequest(run=run, server_id="s", version=root, max_members=20),
        ).tickets
        for number, ticket in enumerate(tickets):
            self.inputs.learn(ticket)
            for member in ticket.members:
                items = builders.whole(
                    codec.ticket_from_proto(ticket).members[0],
                    ticket.attempt,
                    builders.chunk([self._head], token_id=self._rng.randrange(60)),
                )
                request = replay_pb2.WriteTrajectoriesRequest(
                    run=run,
                    server_id="s",
                    items=[codec.item_to_proto(_renamed(item, member.trajectory_id)) for item in items],
                )
                self.inputs.learn(request)
                if number % 2 == 0:
                    self.harness.write([request])
                else:
                    self._open = [*self._open[-50:], (member.trajectory_id, ticket.attempt)]
        self._good("RenewLeases", replay_pb2.RenewLeasesRequest(run=run, server_id="s"))
        step = self._head.step + 1
        self._good("DrawBatch", replay_pb2.DrawBatchRequest(run=run, epoch=self._epoch, step=step))
        version = builders.version(step, self._epoch)
        self._good(
            "Advance",
            replay_pb2.AdvanceRequest(run=run, epoch=self._epoch, version=codec.version_to_proto(version), parent=root),
        )
        self._good("Commit", replay_pb2.CommitRequest(run=run, epoch=self._epoch, step=step))
        self._head = version
        self.inputs.learn(replay_pb2.RollbackRunRequest(run=run, version=root))
        self.inputs.learn(trajectory_pb2.TrajectoryChunk.FromString(builders.chunk([self._head])))
        self._good("GetRunStatus", replay_pb2.GetRunStatusRequest(run=run))

    def _good(self, method: str, request: Message) -> Any:
        self.inputs.learn(request)
        for known in self.inputs.good.values():
            del known[:-40]
        del self.inputs.words[:-150], self.inputs.blobs[:-150]
        return self.harness.call(method, request)

    def close(self) -> None:
        self.harness.close()
        self.harness.loop.close()
        shutil.rmtree(self._directory)


class PolicyTarget:
    """The learner's publisher."""

    def __init__(self, rng: Random) -> None:
        self._loop = asyncio.new_event_loop()
        self._inputs = Inputs(rng)
        self._rng = rng
        self._publisher = Publisher("r", arithmetic.SIGNATURE, LearnerMetrics(CollectorRegistry()))
        version, (manifest, buffers) = policy_version("r", 1, 1), arithmetic.published_weights(0, 1)
        self._loop.run_until_complete(self._publisher.publish(WeightSnapshot(version, 1, manifest, buffers)))
        hello = policy_pb2.PolicyWatcher(
            run="r", server_id="s", signature=codec.signature_to_proto(arithmetic.SIGNATURE)
        )
        acknowledgement = policy_pb2.PolicyAcknowledgement(version=codec.version_to_proto(version))
        self._inputs.learn(policy_pb2.WatchPolicyRequest(hello=hello))
        self._inputs.learn(policy_pb2.WatchPolicyRequest(acknowledgement=acknowledgement))
        self._inputs.learn(policy_pb2.FetchWeightsRequest(version=codec.version_to_proto(version)))

    def try_one(self) -> str:
        methods = policy_pb2.DESCRIPTOR.services_by_name["PolicyService"].methods_by_name
        watch = self._rng.random() < 0.6
        method = methods["WatchPolicy" if watch else "FetchWeights"]
        requests = [self._inputs.message(method.input_type) for _ in range(self._rng.randint(1, 3) if watch else 1)]
        if None in requests:
            return "no message"
        handler = getattr(self._publisher, method.name)
        argument: Any = _stream(requests) if watch else requests[0]
        return self._loop.run_until_complete(_exhausted(handler(argument, Context())))

    def close(self) -> None:
        self._loop.close()


class InferenceTarget:
    """An inference server with the arithmetic engine."""

    def __init__(self, rng: Random) -> None:
        self._loop = asyncio.new_event_loop()
        self._inputs = Inputs(rng)
        self._rng = rng
        self._loop.run_until_complete(self._open())

    async def _open(self) -> None:
        engine = ArithmeticEngine(ArithmeticEngineOptions(token_seconds=0.0))
        self._service = InferenceServicer(engine, ServedPolicy(engine, "r"))
        version, (manifest, buffers) = policy_version("r", 1, 1), arithmetic.published_weights(0, 1)
        await engine.update_weights(WeightSnapshot(version, 1, manifest, buffers))
        self._inputs.learn(
            inference_pb2.GenerateRequest(
                prompt_token_ids=codec.array_to_proto(np.arange(1, 5, dtype=np.int32)),
                sampling=codec.sampling_to_proto(SamplingParams(max_tokens=3)),
            )
        )

    def try_one(self) -> str:
        methods = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].methods
        method = self._rng.choice([method for method in methods if method.name != "PauseGeneration"])
        request = self._inputs.message(method.input_type)
        if request is None:
            return "no message"
        handler = getattr(self._service, method.name)
        argument: Any = _stream([request]) if method.client_streaming else request
        return self._loop.run_until_complete(_exhausted(handler(argument, Context())))

    def close(self) -> None:
        self._loop.close()


class RecordTarget:
    """Payloads of log records."""

    def __init__(self, rng: Random, payloads: Sequence[bytes]) -> None:
        self._rng, self._payloads = rng, payloads
        self._inputs = Inputs(rng)

    def try_one(self) -> str:
        try:
            decode(self._inputs.damaged(self._rng.choice(self._payloads)))
        except LeewayError as error:
            return type(error).__name__
        return "done"

    def close(self) -> None: ...


class SegmentTarget:
    """The log reader."""

    def __init__(self, rng: Random, payloads: Sequence[bytes]) -> None:
        self._rng, self._payloads = rng, payloads
        self._inputs = Inputs(rng)
        self._directory = Path(tempfile.mkdtemp(prefix="fuzz-"))

    def try_one(self) -> str:
        rng, path = self._rng, self._directory / "segment-00000001.log"
        whole = b"".join(frame(rng.choice(self._payloads)) for _ in range(rng.randint(1, 6)))
        path.write_bytes(rng.randbytes(rng.randrange(200)) if rng.random() < 0.1 else self._inputs.damaged(whole))
        try:
            read = b"".join(frame(payload) for _, payload in verify_segment(path, last=rng.random() < 0.8))
        except LeewayError as error:
            return type(error).__name__
        assert path.read_bytes() == read, "what is left is not what was read"
        return "done"

    def close(self) -> None:
        shutil.rmtree(self._directory)


class DirectoryTarget:
    """A start of the buffer on a directory of which one file is damaged or gone."""

    def __init__(self, rng: Random, directory: Path) -> None:
        self._rng, self._source = rng, directory
        self._inputs = Inputs(rng)
        self._directory = Path(tempfile.mkdtemp(prefix="fuzz-"))

    def try_one(self) -> str:
        rng, copy = self._rng, self._directory / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self._source, copy)
        victims = sorted(path for path in copy.iterdir() if path.name != "lock" and path.stat().st_size)
        victim = rng.choice(victims)
        if rng.random() < 0.1:
            victim.unlink()
        else:
            victim.write_bytes(self._inputs.damaged(victim.read_bytes()))
        try:
            harness = Harness(copy)
        except LeewayError as error:
            return f"{victim.suffix or victim.name} {type(error).__name__}"
        try:
            harness.call("ExportGroups", replay_pb2.ExportGroupsRequest(run=builders.RUN))
            harness.call("GetRunStatus", replay_pb2.GetRunStatusRequest(run=builders.RUN))
        except LeewayError as error:
            return f"{victim.suffix or victim.name} then {type(error).__name__}"
        finally:
            harness.close()
            harness.loop.close()
        return f"{victim.suffix or victim.name} done"

    def close(self) -> None:
        shutil.rmtree(self._directory)


def _renamed(item: WriteItem, trajectory_id: str) -> WriteItem:
    return WriteItem(trajectory_id, item.attempt, item.seq, item.content)


async def _stream(requests: Sequence[Any]) -> AsyncIterator[Any]:
    for request in requests:
        yield request


async def _exhausted(answer: Any) -> str:
    """Run a handler to its end. Raises Stuck when there is none."""
    try:
        async with asyncio.timeout(_PATIENCE_SECONDS):
            if hasattr(answer, "__aiter__"):
                async for _ in answer:
                    pass
            else:
                await answer
    except LeewayError as error:
        return type(error).__name__
    except TimeoutError as error:
        raise Stuck("a handler does not end") from error
    return "done"
