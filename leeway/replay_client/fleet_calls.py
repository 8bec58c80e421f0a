"""The run's servers: for the learner, and for people."""

from __future__ import annotations

from leeway import codec
from leeway.replay_client.connection import Connection
from leeway.rpc import mapped_errors
from leeway.types import (
    Drain,
    DrainReason,
    ServerStatus,
)
from leeway.v1 import replay_pb2


class FleetCalls(Connection):
    """Listing servers, draining and readmitting them."""

    async def servers(self) -> list[ServerStatus]:
        """The run's servers, by name."""
        with mapped_errors(f"ListServers at {self.address}"):
            reply = await self.stub.ListServers(
                replay_pb2.ListServersRequest(run=self.run), timeout=self.patience_seconds
            )
        return [codec.server_status_from_proto(server) for server in reply.servers]

    async def drain_server(
        self, server_id: str, reason: DrainReason, message: str, *, epoch: int = 0, force: bool = False
    ) -> tuple[Drain, int]:
        """Take a server out of the run; returns the drain that stands, and how many groups this call dropped.

        Raises:
            PreconditionError: no other server is at work, and `force` is not set.
            FencedError: `epoch` is that of an older learner.
        """
        request = replay_pb2.DrainServerRequest(
            run=self.run,
            server_id=server_id,
            reason=int(reason),  # type: ignore[arg-type]
            message=message,
            epoch=epoch,
            force=force,
        )
        with mapped_errors(f"DrainServer at {self.address}"):
            reply = await self.stub.DrainServer(request, timeout=self.patience_seconds)
        return codec.drain_from_proto(reply.drain), reply.dropped_count

    async def readmit_server(self, server_id: str) -> bool:
        """Let a drained server work again; returns whether it was drained."""
        request = replay_pb2.ReadmitServerRequest(run=self.run, server_id=server_id)
        with mapped_errors(f"ReadmitServer at {self.address}"):
            reply = await self.stub.ReadmitServer(request, timeout=self.patience_seconds)
        return reply.readmitted
