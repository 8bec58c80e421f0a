"""The replay buffer: a durable log, and the state that follows from it.

service      gRPC in, gRPC out
buffer, recorder                                 one event loop: decide, append, apply, wait until durable, answer
lifecycle, tickets, writing, draw, evaluation    pure decisions: state in, transitions out
admission, lineage                               the bounds, as arithmetic
state, groups                                    the fold of transitions
log, segments, records                           transitions as bytes on disk
storage, recovery, snapshots, index              what makes a large log quick to open and small in memory
retention, backup, generation                    what may be deleted; copies
offline, verification, columns                   a directory without a buffer
"""
