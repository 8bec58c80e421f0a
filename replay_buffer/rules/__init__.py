"""The buffer's decisions, without clocks, disks or messages: state in, transitions out.

transitions                              everything that can happen to a run
groups, lineage, state; fold             a run's state; how transitions change it
opening, lifecycle, drain                decisions about a run: where it resumes, advancing, its servers
tickets, draw, evaluation                decisions about a server's tickets, a step's groups, an evaluation
completion, dead_letters                 decisions about a group that has closed, or never will
admission                                the staleness bound, as arithmetic
leases                                   a hint, never a reason to refuse
"""
