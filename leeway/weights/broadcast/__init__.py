"""Broadcasts of weight bytes from the learner to servers: process groups of torch.distributed.

    learner: Rendezvous (a TCPStore) ──> group, rank 0 ── broadcast, piece by piece ──> group, rank 1, 2, ... : servers
                                                                  │
              gloo: within the process, from its memory to theirs ┤
              NCCL: through a GPU, by a process of its own  ──────┘

Two libraries behind one interface (`library.Library`). With either a group belongs to nobody's default group, so that
it neither meets nor disturbs those of a learner with several ranks; every wait has a deadline: a peer that is silent
for `patience_seconds` ends the group for all. Bytes only, never objects: nothing is pickled. Nothing here is encrypted
or authenticated either; receivers check every digest against what came over the contract's own connection, before an
engine sees a byte.

Only `learner.weights.collective` and `inference_server.weights.collective` import this package, and only when the
configuration asks for broadcasts: `gloo`, `rendezvous` and what runs in the process of `nccl` need torch.
"""
