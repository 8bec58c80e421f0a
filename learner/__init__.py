"""The learner: draws groups, trains with DPPO, publishes weights."""
