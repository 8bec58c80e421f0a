"""A weight receiver in a process of its own, for an engine behind an InferenceService: what a kill -9 ends."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from prometheus_client import CollectorRegistry

from inference_server.engines.remote import RemoteEngine
from inference_server.served_policy import ServedPolicy
from inference_server.weights.receiver import WeightReceiver
from leeway.rpc import Security
from leeway.service.metrics import InferenceServerMetrics
from leeway.weights.broadcast import BroadcastGroup  # imported before the fork: torch takes seconds
from tests.deadlines import WAIT_SECONDS
from tests.harness.processes import hear
from tests.push.history import PIECE_BYTES, RUN


async def _receive(pipe: Any, name: str, backend: str, policy: str, transport: str) -> None:
    engine = await RemoteEngine.connect(backend, Security(), timeout_seconds=WAIT_SECONDS)
    receiver = WeightReceiver(
        policy=ServedPolicy(engine, RUN),
        signature=engine.info().signature,
        run=RUN,
        server_id=name,
        address=policy,
        security=Security(),
        transports=tuple(dict.fromkeys((transport, "grpc"))),
        fetch_timeout_seconds=WAIT_SECONDS,
        metrics=InferenceServerMetrics(CollectorRegistry()),
    )
    hear(pipe, lambda _: os._exit(0))  # whoever started it is gone
    await receiver.run()


def receive(pipe: Any, name: str, backend: str, policy: str, transport: str) -> None:
    """Feed the engine at `backend` from the learner at `policy` until killed."""
    BroadcastGroup.piece_bytes = PIECE_BYTES
    asyncio.run(_receive(pipe, name, backend, policy, transport))
