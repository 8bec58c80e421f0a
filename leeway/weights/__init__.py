"""Published weights: digests, deltas between versions, and the transports that carry them."""
