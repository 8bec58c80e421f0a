"""A process with a reward worker that hangs: prints the worker's process id, then waits to be killed."""

from __future__ import annotations

import asyncio
import sys

from tests.unit.inference_server.test_reward import TASK, WHERE, runner


async def main() -> None:
    rewards = runner("misbehave", timeout_seconds=600)
    await rewards.start()
    worker = rewards._places[0]._worker
    assert worker is not None
    call = asyncio.create_task(rewards.score(TASK, "hang", WHERE))
    await asyncio.wait({call}, timeout=0.2)
    sys.stdout.write(f"{worker._child.process_id}\n")
    sys.stdout.flush()
    await call


if __name__ == "__main__":
    asyncio.run(main())
