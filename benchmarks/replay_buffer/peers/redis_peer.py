"""A client of Redis or Valkey that obeys JSON lines on stdin: `drive PORT`.

Runs in an environment of its own, without Leeway. Writes go to a stream in pipelines of about a mebibyte, so that the
server's event loop makes many of them durable with one fsync.
"""

import json
import os
import sys
import time

import redis

STREAM = "trajectories"
PIPELINE_BYTES = 1 << 20


def drive(port: int) -> None:
    """Insert and draw as told; one answer per line."""
    client = redis.Redis(port=port)
    print(json.dumps({"ready": client.ping()}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        began, cpu = time.perf_counter(), time.process_time()
        if order["op"] == "insert":
            insert(client, order["size_bytes"], order["count"])
        else:
            draw(client, order["size_bytes"], order["count"])
        print(
            json.dumps({"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}), flush=True
        )
        if order["op"] == "draw":
            client.delete(STREAM)


def insert(client: redis.Redis, size_bytes: int, count: int) -> None:
    """Append entries; each pipeline returns when the log file of the server is synced."""
    data = os.urandom(size_bytes)
    per_pipeline = max(1, PIPELINE_BYTES // size_bytes)
    for begin in range(0, count, per_pipeline):
        pipeline = client.pipeline(transaction=False)
        for _ in range(min(per_pipeline, count - begin)):
            pipeline.xadd(STREAM, {"data": data})
        pipeline.execute()


def draw(client: redis.Redis, size_bytes: int, count: int) -> None:
    """Read every entry once, about a mebibyte at a time."""
    per_read, last, got = max(1, PIPELINE_BYTES // size_bytes), "-", 0
    while got < count:
        entries = client.xrange(STREAM, min=last, count=per_read)
        got += len(entries)
        last = b"(" + entries[-1][0]


if __name__ == "__main__":
    drive(int(sys.argv[2]))
