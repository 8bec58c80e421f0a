"""A weight receiver in a process of its own, for an engine behind an InferenceService: what a kill -9 ends.

`python -m tests.push.receiver_process --backend HOST:PORT --policy HOST:PORT --server-id NAME [--grpc]`
"""

from __future__ import annotations

import argparse
import asyncio

from prometheus_client import CollectorRegistry

from inference_server.engines.remote import RemoteEngine
from inference_server.served_policy import ServedPolicy
from inference_server.weight_receiver import WeightReceiver
from leeway.metrics import InferenceServerMetrics
from leeway.rpc import Security


async def _receive(arguments: argparse.Namespace) -> None:
    engine = await RemoteEngine.connect(arguments.backend, Security(), timeout_seconds=30.0)
    receiver = WeightReceiver(
        policy=ServedPolicy(engine, arguments.run),
        signature=engine.info().signature,
        run=arguments.run,
        server_id=arguments.server_id,
        address=arguments.policy,
        security=Security(),
        allow_local=not arguments.grpc,
        fetch_timeout_seconds=30.0,
        metrics=InferenceServerMetrics(CollectorRegistry()),
    )
    await receiver.run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--backend", "--policy", "--server-id", "--run"):
        parser.add_argument(name, required=True)
    parser.add_argument("--grpc", action="store_true", help="not over ZeroMQ")
    asyncio.run(_receive(parser.parse_args()))


if __name__ == "__main__":
    main()
