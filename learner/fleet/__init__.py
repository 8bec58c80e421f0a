"""Finding servers that diverge or are slow, and taking them out of the run."""
