"""Publishing weights: the versions on offer, their announcement, and the outlets that send their bytes."""
