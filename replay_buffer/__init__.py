"""The replay buffer: a durable log, and the state that follows from it.

A request goes down this list, and its answer waits for the log:

rpc/           gRPC in, gRPC out: service, write_stream, response_stream
buffer         one event loop: decide, append, apply, wait until durable, answer
run_store      the runs of a directory: appends what is decided, applies it and wakes those who wait
live/          in memory while serving: writing (judges one item), open_trajectories, backpressure, servers, wakeup
rules/         pure: the state as a fold of transitions, and every decision about it
storage/       the log on disk, and what makes it quick to open, small in memory and short

Beside it: observer and metrics (watching), malloc_tuning.
"""
