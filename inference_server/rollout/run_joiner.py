"""How a server gets into a run: it fits, the run is open, and a first version is in force."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from inference_server.served_policy import ServedPolicy
from leeway.errors import DeadlineError, ExhaustedError, PreconditionError, UnavailableError
from leeway.replay_client import ReplayClient
from leeway.rpc import Backoff
from leeway.types import EngineInfo, LogprobMode, RunSpec

_JOIN_WAIT_SECONDS: Final = 30.0

log = logging.getLogger(__name__)


class Joining:
    """Waits for the run, and for a version of it.

    Args:
        client: the replay buffer.
        server_id: this server's name, unique in the run.
        info: what the engine is.
        policy: which version it serves.
        dataset_digest: of the tasks that this server holds.
    """

    def __init__(
        self, client: ReplayClient, server_id: str, info: EngineInfo, policy: ServedPolicy, dataset_digest: bytes
    ) -> None:
        self._client = client
        self._server_id = server_id
        self._info = info
        self._policy = policy
        self._dataset_digest = dataset_digest

    async def begin(self) -> RunSpec | None:
        """Join, and wait for a first version; None when the run has finished: its learner may be gone for good."""
        spec, finished = await self._join()
        while not finished:
            try:
                async with asyncio.timeout(_JOIN_WAIT_SECONDS):
                    await self._policy.wait_for_change(None)
                return spec
            except TimeoutError:
                log.info("no version of run %s has come yet; asking whether it still goes on", spec.run)
                spec, finished = await self._ask_to_join()
        log.info("run %s has finished; there is nothing left to do", spec.run)
        return None

    async def _join(self) -> tuple[RunSpec, bool]:
        info = self._info
        if info.logprob_mode is not LogprobMode.SAMPLED:
            raise PreconditionError(
                f"{info.engine} reports log-probs of the raw distribution; a run needs those of the distribution "
                "sampled from (temperature included): set the engine's log-prob mode"
            )
        log.info("waiting for run %s to open at %s", self._client.run, self._client.address)
        spec, finished = await self._ask_to_join()
        if spec.sampling.routing and not info.routing:
            raise PreconditionError(f"run {spec.run} records routing, which {info.engine} does not provide")
        if spec.sampling.topk > info.max_topk:
            raise PreconditionError(
                f"run {spec.run} records top-{spec.sampling.topk}; {info.engine} provides at most {info.max_topk}"
            )
        log.info("joined run %s", spec.run)
        return spec, finished

    async def _ask_to_join(self) -> tuple[RunSpec, bool]:
        backoff = Backoff()
        while True:
            try:
                return await self._client.join_run(
                    self._server_id, self._info.signature, self._dataset_digest, _JOIN_WAIT_SECONDS
                )
            except (DeadlineError, UnavailableError, ExhaustedError) as error:
                log.info("run %s is not open yet (%s)", self._client.run, error.message)
                await backoff.pause(error.retry_seconds if isinstance(error, ExhaustedError) else None)
