"""A link of limited rate to a TCP port, in a process of its own; prints the port to connect to.

`python -m benchmarks.weight_push.link --to 5000 --megabits 100`: each direction is paced by its own clock, to which
every piece adds its size over the rate; what a late wake-up lost of the last 20 ms is made up for, so that the rate is
kept. Nothing is read ahead of what may be sent, so that the sender feels the link.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import Final

_PIECE_BYTES: Final = 16 << 10
_BURST_SECONDS: Final = 0.02


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, bytes_per_second: float) -> None:
    """Copy one direction."""
    loop = asyncio.get_running_loop()
    free_at = loop.time()
    while piece := await reader.read(_PIECE_BYTES):
        free_at = max(free_at, loop.time() - _BURST_SECONDS) + len(piece) / bytes_per_second
        if free_at > loop.time():
            await asyncio.sleep(free_at - loop.time())
        writer.write(piece)
        await writer.drain()
    writer.close()


async def serve(to: int, megabits: float) -> None:
    """Forward until killed."""
    bytes_per_second = megabits * 1e6 / 8

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", to, limit=_PIECE_BYTES)
        await asyncio.gather(
            pump(reader, far_writer, bytes_per_second),
            pump(far_reader, writer, bytes_per_second),
            return_exceptions=True,
        )

    server = await asyncio.start_server(forward, "127.0.0.1", 0, limit=_PIECE_BYTES)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main() -> None:
    """Parse and serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=int, required=True)
    parser.add_argument("--megabits", type=float, required=True)
    arguments = parser.parse_args()
    asyncio.run(serve(arguments.to, arguments.megabits))


if __name__ == "__main__":
    main()
