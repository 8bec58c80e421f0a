"""One trajectory: sampled, its tokens to the writer as they come, then scored; at the end its last item."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Literal

from inference_server.engine import Engine, GenerationEnd, GenerationRequest
from inference_server.requests import Closing
from inference_server.rollout.open_tickets import Loan
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
class Ending:
    """How a trajectory ends."""

    item: WriteItem
    outcome: Literal["closed", "failed"]
    fatal: LeewayError | None = None  # whatever this process does next would fail too


class Rollouts:
    """Samples and scores the members of loans.

    Args:
        engine: samples.
        policy: which version it serves.
        writer: takes the chunks.
        tokenizer: decodes completions.
        reward: scores them.
        timeout_seconds: longest generation, queueing included.
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
        self._info = engine.info()
        self._policy = policy
        self._writer = writer
        self._tokenizer = tokenizer
        self._reward = reward
        self._timeout_seconds = timeout_seconds
        self._metrics = metrics

    async def run(self, loan: Loan, recorder: TrajectoryRecorder) -> Ending:
        """Sample, score and close one trajectory, or say why not."""
        fatal: LeewayError | None = None
        try:
            async with asyncio.timeout(self._timeout_seconds):
                outcome: GenerationEnd | TrajectoryFailure = await self._sample(loan, recorder)
        except TimeoutError:
            seconds = self._timeout_seconds
            outcome = TrajectoryFailure(f"generation took longer than {seconds:g} s on {loan.where}", retryable=True)
        except InvalidDataError as error:
            outcome = TrajectoryFailure(f"{loan.where}: {error.message}", retryable=False)
        except DeadlineError as error:
            outcome = TrajectoryFailure(f"{loan.where}: {error.message}", retryable=True)
        except (UnavailableError, PreconditionError) as error:
            # Stopped, or restarted without its weights: whatever this process samples next would fail too.
            fatal = UnavailableError(f"the engine is gone: {error.message}")
            outcome = TrajectoryFailure(error.message, retryable=True)
        if isinstance(outcome, GenerationEnd):
            text = self._tokenizer.decode(recorder.sampled_token_ids)
            try:
                reward = await self._reward.score(loan.task, text, loan.where)
            except ExhaustedError as error:
                fatal = error
                reward = TrajectoryFailure(error.message, retryable=True)
            if not isinstance(reward, TrajectoryFailure):
                return Ending(recorder.close(outcome, reward), "closed")
            outcome = reward
        log.warning("%s fails: %s", recorder.trajectory_id, outcome.message)
        return Ending(recorder.failure(outcome), "failed", fatal)

    async def _sample(self, loan: Loan, recorder: TrajectoryRecorder) -> GenerationEnd | TrajectoryFailure:
        """Stream one completion to the writer."""
        unusable = self._unusable(loan)
        if unusable is not None:
            return unusable
        pinned = loan.ticket.pinned_version
        request = GenerationRequest(recorder.trajectory_id, loan.prompt, recorder.sampling)
        backoff = Backoff()
        while True:
            try:
                async with Closing(self._engine.generate(request)) as events:
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
                raise UnavailableError("the engine ended a generation without saying why")
            except ExhaustedError as error:
                # A backend may queue less than it decodes at once; it has room again in a moment.
                await backoff.pause(error.retry_seconds)

    def _unusable(self, loan: Loan) -> TrajectoryFailure | None:
        """Why a loan cannot be worked on at all."""
        context_length = self._info.signature.context_length
        pinned = loan.ticket.pinned_version
        if not loan.task:
            return TrajectoryFailure(f"{loan.where} does not exist on this server", retryable=False)
        if not len(loan.prompt):
            return TrajectoryFailure(f"{loan.where}: its prompt has no tokens", retryable=False)
        if len(loan.prompt) + 1 > context_length:
            message = f"{loan.where}: its prompt has {len(loan.prompt)} tokens; the model's context is {context_length}"
            return TrajectoryFailure(message, retryable=False)
        if pinned is not None and pinned != self._policy.version:
            return TrajectoryFailure(f"evaluation of {pinned}: this server has moved on", retryable=True)
        return None

    def _checked(self, end: GenerationEnd, recorder: TrajectoryRecorder) -> GenerationEnd | TrajectoryFailure:
        if end.finish_reason is FinishReason.ABORTED:
            return TrajectoryFailure("the engine gave up the request", retryable=True)
        if end.num_tokens != recorder.num_sampled or not recorder.num_sampled:
            message = f"the engine announced {end.num_tokens} tokens, but sent {recorder.num_sampled}"
            return TrajectoryFailure(message, retryable=False)
        self._metrics.tokens.inc(end.num_tokens)
        return end
