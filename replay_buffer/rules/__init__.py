"""What is decided, without clocks, disks or messages: state in, transitions out.

transitions                                    what can happen to a run
groups, lineage, state; fold                   what that makes of it; how
opening, lifecycle                             decisions about a run: where it goes on from, and its way
tickets, draw, evaluation                      decisions about a server's work, a step, an evaluation
completion, dead_letters                       decisions about a group that has closed, or never will
admission                                      the bounds, as arithmetic
leases                                         a hint, never a reason to refuse
"""
