"""Which servers diverge or are slow, and what is done about it."""
