"""What a run leaves behind: checkpoints, journal, receipts, and how a step is computed again from them."""
