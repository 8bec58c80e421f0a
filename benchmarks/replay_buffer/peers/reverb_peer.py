"""Reverb behind two roles: `serve PORT DIRECTORY`, and `drive PORT`, which obeys JSON lines on stdin.

Runs in an environment of its own, without Leeway. Its writer is the fastest that Reverb has: one trajectory writer that
waits for no confirmation but the flush at the end, one item per trajectory, its bytes as one array.
"""

import json
import os
import sys
import time

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import numpy as np
import reverb

TABLE = "trajectories"
FLUSH_ITEMS = 48


def serve(port: int, directory: str) -> None:
    """Serve one table until stdin ends; what a checkpoint of the directory holds is loaded first."""
    checkpointer = reverb.platform.checkpointers_lib.DefaultCheckpointer(path=directory)
    table = reverb.Table(
        name=TABLE,
        sampler=reverb.selectors.Fifo(),
        remover=reverb.selectors.Fifo(),
        max_size=1_000_000,
        rate_limiter=reverb.rate_limiters.MinSize(1),
        max_times_sampled=1,
    )
    server = reverb.Server([table], port=port, checkpointer=checkpointer)
    print(json.dumps({"ready": True}), flush=True)
    sys.stdin.read()
    server.stop()


def drive(port: int) -> None:
    """Insert, draw and checkpoint as told; one answer per line."""
    client = reverb.Client(f"127.0.0.1:{port}")
    client.server_info(timeout=60)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        began, cpu = time.perf_counter(), time.process_time()
        answer = {
            "insert": lambda order=order: insert(client, order["size_bytes"], order["count"]),
            "draw": lambda order=order: draw(client, order["count"]),
            "checkpoint": lambda: {"path": client.checkpoint()},
            "held": lambda: {"held": client.server_info()[TABLE].current_size},
        }[order["op"]]()
        times = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
        print(json.dumps(times | answer), flush=True)


def insert(client: reverb.Client, size_bytes: int, count: int) -> dict:
    """Write items and wait until the server has confirmed all of them (in memory)."""
    data = np.random.default_rng(0).integers(0, 256, size_bytes, dtype=np.uint8)
    with client.trajectory_writer(num_keep_alive_refs=1, validate_items=False) as writer:
        writer.append({"data": data})
        history = writer.history["data"]
        writer.create_item(TABLE, 1.0, {"data": history[-1:]})
        for written in range(1, count):
            writer.append({"data": data})
            writer.create_item(TABLE, 1.0, {"data": history[-1:]})
            if written % FLUSH_ITEMS == 0:
                writer.flush(block_until_num_items=FLUSH_ITEMS)  # beyond about 100 it warns of its memory
        writer.flush()
    return {}


def draw(client: reverb.Client, count: int) -> dict:
    """Sample every item once, in order."""
    size_bytes = 0
    for sample in client.sample(TABLE, num_samples=count, emit_timesteps=False):
        size_bytes += sample.data[0].nbytes
    return {"size_bytes": size_bytes}


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]), sys.argv[3])
    else:
        drive(int(sys.argv[2]))
