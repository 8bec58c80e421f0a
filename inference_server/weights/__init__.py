"""Weights on their way in: announced, fetched, staged, verified, applied."""
