"""The arithmetic engine's InferenceService as a process of its own, without worker and run: a foreign backend.

`python -m tests.harness.arithmetic_backend --address HOST:PORT [--set key=value ...]`
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tomllib

from inference_server.engines.arithmetic import ArithmeticEngine
from inference_server.served_policy import ServedPolicy
from inference_server.service import SERVICE_NAME, add_inference_service
from leeway.config import ArithmeticEngineOptions
from leeway.rpc import Security, start_server
from leeway.service.process import serve
from leeway.types import WeightSnapshot


class StaleEngine(ArithmeticEngine):
    """Acknowledges updates, but keeps its first weights and labels them as the newest."""

    async def update_weights(self, snapshot: WeightSnapshot) -> float:
        before = self._policy
        seconds = await super().update_weights(snapshot)
        if before is not None:
            self._policy = snapshot.version, before[1]
        return seconds


async def _serve(arguments: argparse.Namespace, stop: asyncio.Event) -> None:
    engine_class = StaleEngine if arguments.stale else ArithmeticEngine
    engine = engine_class(ArithmeticEngineOptions(**tomllib.loads("\n".join(arguments.overrides))))
    policy = ServedPolicy(engine, arguments.run)
    add_services = add_inference_service(engine, policy)
    server = await start_server(arguments.address, add_services, [SERVICE_NAME], Security())
    try:
        await stop.wait()
    finally:
        await server.stop(arguments.drain_seconds)
        await engine.aclose()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", required=True)
    parser.add_argument("--run", default="conformance")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--drain-seconds", type=float, default=0.5, help="how long a stop waits for what is in flight")
    parser.add_argument("--exit-code", type=int, default=0, help="of a clean stop")
    parser.add_argument("--stale", action="store_true", help="put every later label on the first weights")
    parser.set_defaults(verbose=False, supervised=False)
    arguments = parser.parse_args()
    return serve("backend", lambda stop: _serve(arguments, stop), arguments) or arguments.exit_code


if __name__ == "__main__":
    sys.exit(main())
