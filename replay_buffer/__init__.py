"""The replay buffer: a durable log, and the state that follows from it.

service      gRPC in, gRPC out
buffer       one event loop: decide, append, apply, wait until durable, answer
lifecycle, tickets, writing, draw, evaluation    pure decisions: state in, transitions out
admission, lineage                               the bounds, as arithmetic
state        the fold of transitions
log, segments, records                           transitions as bytes on disk
"""
