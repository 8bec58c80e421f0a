"""Files of a run: checkpoints, journal, receipts; and the recomputation of a step from them."""
