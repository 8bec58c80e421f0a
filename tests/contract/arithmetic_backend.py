"""The arithmetic engine's InferenceService as a process of its own, without worker and run: a foreign backend.

`python -m tests.contract.arithmetic_backend --address HOST:PORT [--set key=value ...]`
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tomllib

from inference_server.engines.arithmetic import ArithmeticEngine, ArithmeticEngineOptions
from inference_server.served_policy import ServedPolicy
from inference_server.service import SERVICE_NAME, add_inference_service
from leeway.process import serve
from leeway.rpc import Security, start_server


async def _serve(address: str, run: str, options: ArithmeticEngineOptions, stop: asyncio.Event) -> None:
    engine = ArithmeticEngine(options)
    policy = ServedPolicy(engine, run)
    server = await start_server(address, add_inference_service(engine, policy), [SERVICE_NAME], Security())
    try:
        await stop.wait()
    finally:
        await engine.aclose()
        await server.stop(0.5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", required=True)
    parser.add_argument("--run", default="conformance")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.set_defaults(verbose=False, supervised=False)
    arguments = parser.parse_args()
    options = ArithmeticEngineOptions(**tomllib.loads("\n".join(arguments.overrides)))
    return serve("backend", lambda stop: _serve(arguments.address, arguments.run, options, stop), arguments)


if __name__ == "__main__":
    sys.exit(main())
