"""One trajectory from prompt to close: its tokens are sampled and written as they come, then its text is scored."""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal

from inference_server.engine import Engine, GenerationEnd, GenerationRequest
from inference_server.rollout.open_tickets import OpenTicket
from inference_server.rollout.reward import RewardRunner
from inference_server.rollout.text import Tokenizer
from inference_server.rollout.trajectory_recorder import TrajectoryRecorder
from inference_server.rollout.trajectory_writer import TrajectoryWriter
from inference_server.served_policy import ServedPolicy
from leeway.errors import (
    DeadlineError,
    ExhaustedError,
    InvalidDataError,
    LeewayError,
    PreconditionError,
    UnavailableError,
)
from leeway.rpc import Backoff
from leeway.service.metrics import InferenceServerMetrics
from leeway.types import FinishReason, TrajectoryFailure, WriteItem

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RolloutEnd:
    """The last item of a trajectory: its close, or why it failed."""

    item: WriteItem
    outcome: Literal["closed", "failed"]
    fatal: LeewayError | None = None  # set when this process cannot sample or score anything any more


class Rollouts:
    """Samples and scores the trajectories of open tickets.

    Args:
        engine: samples.
        policy: the version that the engine serves.
        writer: takes the chunks.
        tokenizer: decodes completions.
        reward: scores them.
        timeout_seconds: longest generation of one trajectory, its wait for the engine included.
        metrics: counts tokens.
    """

    def __init__(
        self,
        engine: Engine,
        policy: ServedPolicy,
        writer: TrajectoryWriter,
        tokenizer: Tokenizer,
        reward: RewardRunner,
        timeout_seconds: float,
        metrics: InferenceServerMetrics,
    ) -> None:
        self._engine = engine
        self._context_length = engine.info().signature.context_length
        self._policy = policy
        self._writer = writer
        self._tokenizer = tokenizer
        self._reward = reward
        self._timeout_seconds = timeout_seconds
        self._metrics = metrics

    async def run(self, held: OpenTicket, recorder: TrajectoryRecorder) -> RolloutEnd:
        """Sample and score one trajectory; returns its close, or the failure that ends it."""
        fatal: LeewayError | None = None
        try:
            async with asyncio.timeout(self._timeout_seconds):
                outcome: GenerationEnd | TrajectoryFailure = await self._sample(held, recorder)
        except TimeoutError:
            seconds = self._timeout_seconds
            outcome = TrajectoryFailure(f"generation took longer than {seconds:g} s on {held.where}", retryable=True)
        except InvalidDataError as error:
            outcome = TrajectoryFailure(f"{held.where}: {error.message}", retryable=False)
        except DeadlineError as error:
            outcome = TrajectoryFailure(f"{held.where}: {error.message}", retryable=True)
        except (UnavailableError, PreconditionError) as error:
            # It has stopped, or restarted without its weights: every later rollout of this process would fail as well.
            fatal = UnavailableError(f"the engine is gone: {error.message}")
            outcome = TrajectoryFailure(error.message, retryable=True)
        if isinstance(outcome, GenerationEnd):
            text = self._tokenizer.decode(recorder.sampled_token_ids)
            try:
                reward = await self._reward.score(held.task, text, held.where)
            except LeewayError as error:
                fatal = error
                reward = TrajectoryFailure(error.message, retryable=True)
            if not isinstance(reward, TrajectoryFailure):
                return RolloutEnd(recorder.close(outcome, reward), "closed")
            outcome = reward
        log.warning("%s failed: %s", recorder.trajectory_id, outcome.message)
        return RolloutEnd(recorder.failure(outcome), "failed", fatal)

    async def _sample(self, held: OpenTicket, recorder: TrajectoryRecorder) -> GenerationEnd | TrajectoryFailure:
        """Sample one completion and write its chunks as they come."""
        if (refusal := self._refusal(held)) is not None:
            return refusal
        pinned = held.ticket.pinned_version
        request = GenerationRequest(recorder.trajectory_id, held.prompt, recorder.sampling)
        backoff = Backoff()
        while True:
            try:
                async with aclosing(self._engine.generate(request)) as events:
                    async for event in events:
                        if isinstance(event, GenerationEnd):
                            if (rest := recorder.rest()) is not None:
                                await self._writer.write([rest])
                                recorder.written()
                            return self._checked(event, recorder)
                        if pinned is not None and any(span.version != pinned for span in event.version_spans):
                            message = f"evaluation of {pinned}: another version came into force"
                            return TrajectoryFailure(message, retryable=True)
                        await self._writer.write([recorder.chunk(event)])
                        recorder.written()
                raise UnavailableError("the engine ended a generation without a finish reason")
            except ExhaustedError as error:
                # A backend may queue fewer requests than it decodes at once; it soon has room again.
                await backoff.pause(error.retry_seconds)

    def _refusal(self, held: OpenTicket) -> TrajectoryFailure | None:
        """Why this server cannot sample for a ticket at all; None when it can."""
        context_length = self._context_length
        pinned = held.ticket.pinned_version
        if not held.task:
            return TrajectoryFailure(f"{held.where} does not exist on this server", retryable=False)
        if not len(held.prompt):
            return TrajectoryFailure(f"{held.where}: its prompt has no tokens", retryable=False)
        if len(held.prompt) + 1 > context_length:
            message = f"{held.where}: its prompt has {len(held.prompt)} tokens; the model's context is {context_length}"
            return TrajectoryFailure(message, retryable=False)
        if pinned is not None and pinned != self._policy.version:
            return TrajectoryFailure(
                f"evaluation of {pinned}: this server serves {self._policy.version}", retryable=True
            )
        return None

    def _checked(self, end: GenerationEnd, recorder: TrajectoryRecorder) -> GenerationEnd | TrajectoryFailure:
        if end.finish_reason is FinishReason.ABORTED:
            return TrajectoryFailure("the engine gave up the request", retryable=True)
        if end.num_tokens != recorder.num_sampled or not recorder.num_sampled:
            message = f"the engine announced {end.num_tokens} tokens, but sent {recorder.num_sampled}"
            return TrajectoryFailure(message, retryable=False)
        self._metrics.tokens.inc(end.num_tokens)
        return end
