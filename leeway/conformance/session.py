"""State that the checks share: the server under test, its description, and the version that it should be serving."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from leeway.conformance.client import BackendClient, Completion, RawPrompt, Refused, Stream, Update
from leeway.conformance.own_server import Starter
from leeway.conformance.requirement import NotSupportedError, Violation
from leeway.conformance.weights import Weights, pieces, rolled
from leeway.rpc import Security
from leeway.types import EngineInfo, Int32Array, PolicyVersion, SamplingParams

_PROMPT_TOKENS = 8
_MOST_LENGTHS = 6


@dataclass(frozen=True, slots=True)
class KitOptions:
    """Options of a run of the kit.

    Args:
        run: name of the run whose versions are pushed; None takes the served version's.
        samples: single-token completions of a test of frequencies, before it decides that it needs more.
        long_tokens: length of a completion that is to be met in mid-sequence; longer ones are tried, too.
        quiet_seconds: how long nothing may come while decoding is paused.
        call_seconds: deadline of each call.
        check_seconds: deadline of each requirement.
        tolerance: by how much a log-prob may differ when the same is sampled again, in nats.
        context_length: the longest sequence, if the server was started with less than its model's own.
        stop_seconds: longest clean stop.
        start_seconds: longest start of a server of the kit's own.
        probe_seconds: how soon after sequences are cancelled another is served, at first; doubled when it is not.
    """

    run: str | None = None
    samples: int = 512
    long_tokens: int = 256
    quiet_seconds: float = 0.5
    call_seconds: float = 60.0
    check_seconds: float = 300.0
    tolerance: float = 0.01
    context_length: int | None = None
    stop_seconds: float = 10.0
    start_seconds: float = 120.0
    probe_seconds: float = 2.0


@dataclass(slots=True)
class Session:
    """One run of the kit against one server.

    Args:
        client: of the server.
        options: of this run.
        base: weights that fit its model; None when the kit cannot push.
        security: certificates, for servers that the kit starts itself.
        own_server: starts another server of the same kind, for the kit to stop; None when it cannot.
    """

    client: BackendClient
    options: KitOptions
    base: Weights | None
    security: Security
    own_server: Starter | None = None
    served: PolicyVersion | None = None  # what should be in force
    publisher_epoch: int = 0
    _info: EngineInfo | None = None
    _other: Weights | None = None
    _next_step: int = 0
    _next_seed: int = 1
    shared: dict[str, Completion] = field(default_factory=dict[str, Completion])  # that several checks look at

    @property
    def info(self) -> EngineInfo:
        """The server's description of itself, from the beginning."""
        if self._info is None:
            raise Violation("the server has not said what it serves")
        return self._info

    async def introduce(self) -> EngineInfo:
        """Ask the server what it serves, for all checks to come."""
        self._info = info = await self.client.info()
        if info.version is not None:
            self.publisher_epoch = max(self.publisher_epoch, info.version.epoch)
        return info

    # Weights

    @property
    def weights(self) -> Weights:
        """Weights that fit the model.

        Raises:
            NotSupportedError: the kit was given none.
        """
        if self.base is None:
            raise NotSupportedError("the kit has no weights for this model; give a checkpoint with --weights")
        return self.base

    @property
    def other_weights(self) -> Weights:
        """Other weights that fit the model."""
        if self._other is None:
            self._other = rolled(self.weights)
        return self._other

    def new_update(self, weights: Weights) -> Update:
        """An update to a version that was never published, by an incarnation never seen before."""
        self.publisher_epoch += 1
        self._next_step += 1
        run = self.options.run or (self.info.version.run if self.info.version else "conformance")
        version = PolicyVersion(run, self.publisher_epoch, self._next_step, weights.digest)
        return Update(self.publisher_epoch, version, weights.manifest, pieces(weights.buffers))

    async def push(self, weights: Weights, first_sizes: Sequence[int] = ()) -> PolicyVersion:
        """Put weights in force under a new version.

        Raises:
            Violation: the reply names another version.
        """
        update = replace(self.new_update(weights), pieces=pieces(weights.buffers, first_sizes))
        version = await self.client.update(update)
        if version != update.version:
            raise Violation(f"UpdateWeights to {update.version} answered that {version} is in force")
        self.served = version
        return version

    # Completions

    def prompt(self, number: int = 0, length: int | None = None) -> Int32Array:
        """A prompt of the kit's; equal numbers give equal prompts. [length] int32."""
        length = length or min(_PROMPT_TOKENS, max(self.context_length // 4, 1))
        rng = np.random.default_rng(number)
        return rng.integers(0, self.info.signature.vocab_size, size=length, dtype=np.int32)

    @property
    def context_length(self) -> int:
        return self.options.context_length or self.info.signature.context_length

    @property
    def long_tokens(self) -> int:
        return min(self.options.long_tokens, self.longest)

    def at_most(self, tokens: int) -> int:
        """So many tokens, or fewer where the context is short."""
        return min(tokens, self.long_tokens)

    @property
    def longest(self) -> int:
        """Tokens that fit after a prompt of the kit's."""
        return self.context_length - len(self.prompt())

    def longer_and_longer(self) -> list[int]:
        """Lengths of sequences in which something is to happen, which in a short one may come too late."""
        longest = self.longest
        lengths = [self.long_tokens] * 2
        while lengths[-1] < longest and len(lengths) < _MOST_LENGTHS:
            lengths.append(min(lengths[-1] * 4, longest))
        return [*lengths, *lengths[-1:] * 2]

    def seeds(self, count: int) -> range:
        """Seeds that no check has used."""
        self._next_seed += count
        return range(self._next_seed - count, self._next_seed)

    def open(
        self, prompt: Int32Array | RawPrompt | int, sampling: SamplingParams
    ) -> AbstractAsyncContextManager[Stream]:
        """Begin to generate after a prompt, or after the kit's prompt of that number."""
        return self.client.open(self.prompt(prompt) if isinstance(prompt, int) else prompt, sampling)

    async def generate(self, prompt: Int32Array | int, sampling: SamplingParams) -> Completion:
        """One whole completion."""
        async with self.open(prompt, sampling) as stream:
            return await stream.rest()

    async def generate_all(self, requests: Iterable[tuple[Int32Array, SamplingParams]]) -> list[Completion]:
        """Many, as many at once as the server decodes at once."""
        slots = asyncio.Semaphore(max(min(self.info.max_concurrency, 64), 1))

        async def one(prompt: Int32Array, sampling: SamplingParams) -> Completion:
            async with slots:
                return await self.generate(prompt, sampling)

        tasks: list[asyncio.Task[Completion]] = []
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(prompt, sampling)) for prompt, sampling in requests]
        except* (Refused, Violation) as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def fingerprint(self) -> list[Completion]:
        """A few short completions that look otherwise under other weights."""
        sampling = [SamplingParams(max_tokens=self.at_most(8), seed=7 + number) for number in range(3)]
        return [await self.generate(number, each) for number, each in enumerate(sampling)]

    def same_fingerprint(self, one: Sequence[Completion], other: Sequence[Completion]) -> bool:
        """True if two fingerprints are of the same weights."""
        return all(a.equals(b, self.options.tolerance) for a, b in zip(one, other, strict=True))

    # State

    @asynccontextmanager
    async def paused(self) -> AsyncGenerator[None]:
        """Decoding stands still within the block, if the server does what it says."""
        await self.client.pause()
        try:
            yield
        finally:
            await self.client.resume()

    async def recover(self) -> None:
        """After a check that failed: let the server decode again, with the kit's own weights."""
        with contextlib.suppress(Refused):
            await self.client.resume()
        if self.base is not None:
            with contextlib.suppress(Refused, Violation):
                await self.push(self.base)
