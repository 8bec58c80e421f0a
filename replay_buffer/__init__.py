"""The replay buffer: a durable log, and the state that follows from it.

A request goes down this list, and its answer waits for the log:

service, write_stream, pieces      gRPC in, gRPC out
buffer                             one event loop: decide, append, apply, wait until durable, answer
learner_calls, people_calls        the same, for what the learner, people and their tools ask
writing, drafts, intake            one written item, judged; how much may be in memory that is not durable yet
recorder                           the runs of a directory: what has been decided is appended, applied and told
rules/                             pure: the state as a fold of transitions, and every decision about it
storage/                           the log on disk, and what makes it quick to open, small in memory and short

Beside it: views (a group at one moment), asks (what servers have asked for), signals (waiting without polling),
observer and metrics (watching), options, memory.
"""
