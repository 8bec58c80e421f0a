"""From drawn groups to packed micro-batches. NumPy only."""
