"""What is decided, without clocks, disks or messages: state in, transitions out.

transitions                                    what can happen to a run
groups, lineage, state                         the fold of it
lifecycle, tickets, draw, evaluation           decisions about a run, a server's work, a step, an evaluation
completion, dead_letters                       decisions about a group that has closed, or never will
admission                                      the bounds, as arithmetic
leases                                         a hint, never a reason to refuse
"""
