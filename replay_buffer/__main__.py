"""`leeway serve replay-buffer`: serves the durable log of one directory until told to stop."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Sequence

from prometheus_client import CollectorRegistry

from leeway.config import RunConfiguration, load_configuration
from leeway.errors import LeewayError
from leeway.rpc import Security, start_server
from leeway.service.metrics import ReplayBufferMetrics, serve_metrics
from leeway.service.process import report_error, serve, service_parser
from replay_buffer.buffer import ReplayBuffer
from replay_buffer.live.backpressure import free_bytes_of
from replay_buffer.malloc_tuning import keep_freed_memory
from replay_buffer.metrics import BufferMetrics
from replay_buffer.rpc.service import SERVICE_NAME, ReplayService
from replay_buffer.storage.log import Log, LogOptions

log = logging.getLogger("replay_buffer")


async def run(configuration: RunConfiguration, security: Security, stop: asyncio.Event) -> None:
    """Serve until `stop` is set or the log dies.

    Raises:
        ConfigError: the directory or a port cannot be had.
        CorruptDataError: the log is damaged.
        LogFailedError: the disk failed; restart to verify the log.
    """
    options, network, ports = configuration.replay_buffer, configuration.network, configuration.metrics
    registry = CollectorRegistry()
    metrics = ReplayBufferMetrics(registry)

    def on_durable(records: int, size_bytes: int, seconds: float) -> None:
        metrics.appended_records.inc(records)
        metrics.appended_bytes.inc(size_bytes)
        metrics.fsync_seconds.observe(seconds)

    durable_log = Log(LogOptions(options.directory, options.segment_bytes, options.disk_retry_seconds), on_durable)
    try:
        metrics.log_bytes.set_function(lambda: durable_log.size_bytes)
        metrics.free_bytes.set_function(lambda: free_bytes_of(options.directory))
        metrics.stalled.set_function(lambda: durable_log.stalled)
        buffer = ReplayBuffer(options, durable_log, BufferMetrics(metrics))
        metrics.received_bytes.set_function(lambda: buffer.backpressure.received_bytes)
        metrics.waiting_bytes.set_function(lambda: buffer.backpressure.waiting_bytes)
        buffer.start()
        serve_metrics(registry, ports.host, ports.replay_buffer)
        service = ReplayService(buffer)
        server = await start_server(network.replay_buffer, service.add_to, [SERVICE_NAME], security)
        log.info("serving %s on %s", options.directory, network.replay_buffer)
        try:
            await _stopped_or_failed(stop, durable_log)
        finally:
            buffer.stop()
            service.stop()
            await server.stop(options.stop_seconds)
            await buffer.aclose()
    finally:
        await durable_log.aclose()
    log.info("stopped")


async def _stopped_or_failed(stop: asyncio.Event, durable_log: Log) -> None:
    stopping = asyncio.create_task(stop.wait())
    failed = asyncio.create_task(durable_log.wait_failed())
    done, pending = await asyncio.wait([stopping, failed], return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    for task in done:
        task.result()


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, check, serve; returns the exit code."""
    parser = service_parser("leeway serve replay-buffer", "The durable replay buffer of a run.")
    arguments = parser.parse_args(argv)
    try:
        configuration = load_configuration(arguments.config, arguments.overrides)
        security = configuration.network.security()
    except LeewayError as error:
        return report_error("replay_buffer", error)
    if arguments.check:
        return 0
    keep_freed_memory()
    return serve("replay_buffer", lambda stop: run(configuration, security, stop), arguments)


if __name__ == "__main__":
    sys.exit(main())
