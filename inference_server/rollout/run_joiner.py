"""How a server joins a run: the engine fits, the run is open, and a first version is in force."""

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


class RunJoiner:
    """Waits until the run is open, and until one of its versions is in force.

    Args:
        client: the replay buffer.
        server_id: this server's name, unique in the run.
        info: the engine's description of itself.
        policy: the version that the engine serves.
        dataset_digest: digest of the tasks that this server holds.
    """

    def __init__(
        self, client: ReplayClient, server_id: str, info: EngineInfo, policy: ServedPolicy, dataset_digest: bytes
    ) -> None:
        self._client = client
        self._server_id = server_id
        self._info = info
        self._policy = policy
        self._dataset_digest = dataset_digest

    async def join(self) -> RunSpec | None:
        """Join, and wait for a first version. None: the run has finished, and its learner may never come back.

        Raises:
            PreconditionError: the engine cannot record what the run needs.
        """
        if self._info.logprob_mode is not LogprobMode.SAMPLED:
            raise PreconditionError(
                f"{self._info.engine} reports log-probs of the raw distribution; a run needs those of the distribution "
                "sampled from (temperature included): set the engine's log-prob mode"
            )
        log.info("waiting for run %s to open at %s", self._client.run, self._client.address)
        spec, finished = await self._join_when_open()
        self._check_recordings(spec)
        log.info("joined run %s", spec.run)
        while not finished:
            try:
                async with asyncio.timeout(_JOIN_WAIT_SECONDS):
                    await self._policy.wait_for_change(None)
                return spec
            except TimeoutError:
                log.info("run %s has no version yet; checking that it has not finished", spec.run)
                spec, finished = await self._join_when_open()
        log.info("run %s has finished; nothing left to do", spec.run)
        return None

    def _check_recordings(self, spec: RunSpec) -> None:
        info = self._info
        if spec.sampling.routing and not info.routing:
            raise PreconditionError(f"run {spec.run} records routing, which {info.engine} does not provide")
        if spec.sampling.topk > info.max_topk:
            raise PreconditionError(
                f"run {spec.run} records top-{spec.sampling.topk}; {info.engine} provides at most {info.max_topk}"
            )

    async def _join_when_open(self) -> tuple[RunSpec, bool]:
        backoff = Backoff()
        while True:
            try:
                return await self._client.join_run(
                    self._server_id, self._info.signature, self._dataset_digest, _JOIN_WAIT_SECONDS
                )
            except (DeadlineError, UnavailableError, ExhaustedError) as error:
                log.info("run %s is not open yet (%s)", self._client.run, error.message)
                await backoff.pause(error.retry_seconds if isinstance(error, ExhaustedError) else None)
