"""A backend with a planted fault: it keeps its first weights and puts every later label on them.

`python -m tests.e2e.stale_backend --address HOST:PORT --run NAME`
"""

from __future__ import annotations

import argparse
import asyncio
import sys

from inference_server.engines.arithmetic import ArithmeticEngine
from inference_server.served_policy import ServedPolicy
from inference_server.service import SERVICE_NAME, add_inference_service
from leeway.config import ArithmeticEngineOptions
from leeway.rpc import Security, start_server
from leeway.service.process import serve
from leeway.types import WeightSnapshot


class StaleEngine(ArithmeticEngine):
    """Acknowledges updates that it does not put in force."""

    async def update_weights(self, snapshot: WeightSnapshot) -> float:
        before = self._policy
        seconds = await super().update_weights(snapshot)
        if before is not None:
            self._policy = snapshot.version, before[1]
        return seconds


async def _serve(arguments: argparse.Namespace, stop: asyncio.Event) -> None:
    engine = StaleEngine(ArithmeticEngineOptions(max_concurrency=4, token_seconds=0.02, chunk_tokens=4))
    policy = ServedPolicy(engine, arguments.run)
    server = await start_server(arguments.address, add_inference_service(engine, policy), [SERVICE_NAME], Security())
    try:
        await stop.wait()
    finally:
        await server.stop(0.5)
        await engine.aclose()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", required=True)
    parser.add_argument("--run", required=True)
    parser.set_defaults(verbose=False, supervised=False)
    arguments = parser.parse_args()
    return serve("stale backend", lambda stop: _serve(arguments, stop), arguments)


if __name__ == "__main__":
    sys.exit(main())
